"""The journal of an artifact: a hidden file with one line when a session starts and one when it ends.

It is not a part: manifests hold no time, and no digest covers it. The first line is written at once, so a session that
was killed is known without its duration. Replacing an artifact removes its journal.
"""

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

import psutil

from tsdkd.artifacts.files import JOURNAL_FILE
from tsdkd.artifacts.json_files import conform, parse_json, read_regular_file, unreadable_error
from tsdkd.artifacts.rules import Amount, Count
from tsdkd.errors import TsdkdError
from tsdkd.processes import world_size


@dataclass(frozen=True, slots=True)
class Session:
    """One run of a stage; a session without `exit` was killed or still runs."""

    command: str
    started: str
    """UTC, to the second."""
    machine: str
    processes: Count = 1
    exit: str = ""
    """"finished", "interrupted" or "failed"."""
    cause: str = ""
    """The cause of a failure."""
    seconds: Amount | None = None
    memory: Count | None = None
    """Peak memory of rank 0 in bytes, up to the end of this session."""
    gpu_memory: Count | None = None
    """Peak bytes that rank 0 allocated on one GPU; None without CUDA."""
    warnings: tuple[str, ...] = ()


@contextmanager
def record_session(artifact: Path, command: str, warnings: Sequence[str]) -> Iterator[None]:
    """Record a session around the work inside; `warnings` are read when it ends.

    The journal stays open, because its directory may be renamed before the session ends.
    """
    start = time.monotonic()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    begin = {"command": command, "started": now, "machine": _describe_machine(), "processes": world_size()}
    if cuda := _cuda():
        cuda.reset_peak_memory_stats()

    def end(outcome: dict[str, str]) -> None:
        seconds = round(time.monotonic() - start, 1)
        cost = {"seconds": seconds, "memory": _peak_memory(), "gpu_memory": _gpu_peak_memory()}
        _append(journal, {**outcome, **cost, "machine": _describe_machine(), "warnings": list(warnings)})

    with (artifact / JOURNAL_FILE).open("a+b", buffering=0) as journal:
        _append(journal, begin)
        try:
            yield
        except BaseException as error:
            cause = error.cause if isinstance(error, TsdkdError) else f"{type(error).__name__}: {error}"
            interrupted = isinstance(error, KeyboardInterrupt)
            with suppress(OSError):  # the error that ends the session matters more than its line
                end({"exit": "interrupted"} if interrupted else {"exit": "failed", "cause": cause})
            raise
        end({"exit": "finished"})


def read_sessions(artifact: Path) -> list[Session]:
    """All sessions, oldest first; a line that was cut off is skipped. Raises ArtifactError for another line."""
    journal, recorded = artifact / JOURNAL_FILE, list[dict[str, Any]]()
    try:
        for line in read_regular_file(journal).splitlines():
            try:
                entry: dict[str, Any] = parse_json(line, dict[str, Any])
            except json.JSONDecodeError:
                continue
            if "started" in entry:
                recorded.append(entry)
            elif recorded:
                recorded[-1] |= entry
        return [conform(entry, Session) for entry in recorded]
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise unreadable_error(journal, error, "Remove the file: it is no part of the artifact.") from None


def _append(journal: FileIO, entry: dict[str, Any]) -> None:
    journal.seek(max(0, journal.seek(0, os.SEEK_END) - 1))
    cut_off = journal.read() not in {b"", b"\n"}  # the last line of a killed session
    journal.write(b"\n" * cut_off + json.dumps(entry).encode() + b"\n")
    os.fsync(journal)


def _describe_machine() -> str:
    """Cores, memory, and the names of the GPUs if CUDA is initialised; a query would initialise it."""
    parts = [f"{os.cpu_count()} {platform.machine()} cores", f"{psutil.virtual_memory().total / 1e9:.0f} GB"]
    if cuda := _cuda():
        parts += [cuda.get_device_name(i) for i in range(cuda.device_count())]
    return ", ".join(parts)


def _cuda() -> Any:
    """torch.cuda if it is initialised, else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _gpu_peak_memory() -> int | None:
    cuda = _cuda()
    return max(cuda.max_memory_allocated(i) for i in range(cuda.device_count())) if cuda else None


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
