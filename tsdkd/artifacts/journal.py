"""What it took to make an artifact: a hidden file beside it, with a line where a session starts and one where it ends.

It is no part of the artifact, whose manifest holds no time, and no digest counts it. The first line is written at once,
so a session that was killed is known, though not how long it was. Replacing an artifact removes its journal.
"""

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from tsdkd.artifacts.manifest import JOURNAL_FILE
from tsdkd.errors import TsdkdError
from tsdkd.ranks import world_size


@dataclass(frozen=True, slots=True)
class Session:
    """One call of a stage; without `exit` it was killed, or is still at work."""

    command: str
    started: str
    """UTC, to the second."""
    machine: str
    processes: int = 1
    exit: str = ""
    """"finished", "interrupted" or "failed"."""
    cause: str = ""
    """Of a failure."""
    seconds: float | None = None
    memory: int | None = None
    """The most bytes that the (first) process had at a time, up to the end of this session."""
    gpu_memory: int | None = None
    """The most bytes that it had allocated on one GPU; None without CUDA."""
    warnings: tuple[str, ...] = ()


@contextmanager
def record_session(artifact: Path, command: str, warnings: Sequence[str]) -> Iterator[None]:
    """Record the work inside, and how it ended; `warnings` are read at its end."""
    start = time.monotonic()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    processes = world_size()
    _append(artifact, {"command": command, "started": now, "machine": _machine(), "processes": processes})
    ended = {"exit": "finished"}
    if cuda := _cuda():
        cuda.reset_peak_memory_stats()
    try:
        yield
    except KeyboardInterrupt:
        ended = {"exit": "interrupted"}
        raise
    except BaseException as error:
        cause = error.cause if isinstance(error, TsdkdError) else f"{type(error).__name__}: {error}"
        ended = {"exit": "failed", "cause": cause}
        raise
    finally:
        took = {"seconds": round(time.monotonic() - start, 1), "memory": _peak(), "gpu_memory": _gpu_peak()}
        _append(artifact, {**ended, **took, "machine": _machine(), "warnings": list(warnings)})


def read_sessions(artifact: Path) -> list[Session]:
    """All that were recorded, oldest first; a line that was cut off is left out."""
    found: list[Session] = []
    journal = artifact / JOURNAL_FILE
    for line in journal.read_text().splitlines() if journal.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "started" in entry:
            found.append(Session(**entry))
        elif found:
            found[-1] = replace(found[-1], **entry | {"warnings": tuple(entry["warnings"])})
    return found


def _append(artifact: Path, entry: dict[str, Any]) -> None:
    with (artifact / JOURNAL_FILE).open("a+b") as file:
        file.seek(max(0, file.tell() - 1))
        torn = file.read() not in {b"", b"\n"}  # the line before was cut off
        file.write(b"\n" * torn + json.dumps(entry).encode() + b"\n")


def _machine() -> str:
    """In a few words; GPUs by name once CUDA is in use, since asking earlier would start it."""
    words = [f"{os.cpu_count()} {platform.machine()} cores", f"{psutil.virtual_memory().total / 1e9:.0f} GB"]
    if cuda := _cuda():
        words += [cuda.get_device_name(i) for i in range(cuda.device_count())]
    return ", ".join(words)


def _cuda() -> Any:
    """torch.cuda where it is at work."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _gpu_peak() -> int | None:
    cuda = _cuda()
    return max(cuda.max_memory_allocated(i) for i in range(cuda.device_count())) if cuda else None


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
