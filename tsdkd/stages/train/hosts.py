"""Training on several hosts: all ranks read the same inputs, and see the directory that rank 0 writes."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from tsdkd.artifacts.files import LOCK_FILE
from tsdkd.artifacts.identity import describe_differences
from tsdkd.artifacts.manifest import Manifest
from tsdkd.errors import InputError, OtherRankError, TsdkdError
from tsdkd.processes import rank, world_size
from tsdkd.stages.models.device import default_device

ATTEMPTS, PAUSE = 40, 0.25
"""How often a rank looks for a directory, and the seconds between: NFS shows new names of another host late."""
_compared: ContextVar[bool] = ContextVar("compared", default=True)
"""Whether `require_same_inputs` has compared the ranks of the running stage."""


class _Report(NamedTuple):
    """What a rank tells the others before anything is written."""

    rank: int
    host: str
    manifest: Manifest | None
    """None where its inputs cannot be used."""


@contextmanager
def failing_together() -> Iterator[None]:
    """End all ranks when one cannot use its inputs, instead of letting the others wait for it; decorates stages.

    Rank 0 raises its own error; if it has none, the ranks that failed raise theirs.
    """
    if world_size() == 1 or not _compared.get():
        yield
        return
    PartialState(cpu=default_device() == "cpu")  # connects the ranks
    token = _compared.set(False)
    try:
        yield
    except Exception as error:
        if not _compared.get():
            _report_failure(error)
        raise
    finally:
        _compared.reset(token)


def _report_failure(error: Exception) -> None:
    first = _gather_reports(None)[0]
    if first.manifest is None and rank() != 0:
        raise OtherRankError from error
    if isinstance(error, TsdkdError) and first.host != socket.gethostname():
        error.cause = f"On {socket.gethostname()}: {error.cause}"


def require_same_inputs(manifest: Manifest) -> None:
    """Compare the ranks' inputs, options and versions. Every rank must call it, inside `failing_together`.

    Raises InputError on rank 0 where they differ, and OtherRankError on the others and where another rank has failed.
    """
    if world_size() == 1:
        return
    reports = _gather_reports(manifest)
    _compared.set(True)
    first = reports[0]
    for report in reports:
        if report.manifest is None or first.manifest is None:
            raise OtherRankError
        if differences := describe_differences(first.manifest, report.manifest):
            _raise_on_rank_0(
                f"Rank {report.rank} on {report.host} differs from rank 0 on {first.host}: {'; '.join(differences)}.",
                "Start the same command with the same files and versions on every host.",
            )


def _gather_reports(manifest: Manifest | None) -> list[_Report]:
    """Raises OtherRankError where a rank has ended."""
    try:
        reports: list[_Report] = gather_object([_Report(rank(), socket.gethostname(), manifest)])
    except RuntimeError:  # the connection is closed
        raise OtherRankError from None
    return reports


def agree_on_directory(directory: Path | None) -> Path:
    """The directory that rank 0 has opened. Every rank must call it; on the others, `directory` is ignored.

    Raises InputError on rank 0, and OtherRankError on the others, where a rank cannot write the directory. Where rank 0
    passes None, because it has failed, raises OtherRankError.
    """
    sent: list[tuple[Path, str] | None] = [(directory, _lock_text(directory)) if directory else None]
    (received,) = broadcast_object_list(sent) if world_size() > 1 else sent
    if received is None:
        raise OtherRankError
    directory, text = received
    if world_size() > 1:
        found = gather_object([(socket.gethostname(), _can_write(directory, text))])
        if unable := sorted({host for host, can_write in found if not can_write}):
            _raise_on_rank_0(
                f"{', '.join(unable)} cannot read and write {directory}, which {socket.gethostname()} writes.",
                "Name a directory that all hosts share under the same path and may write (--run or --checkpoint).",
            )
    return directory


def _can_write(directory: Path, text: str) -> bool:
    """Whether this rank reads `text` in the lock file and may write beside it: every rank saves states of its own.

    A complete artifact on a read-only disk, whose `text` is empty, is only read.
    """
    for attempt in range(ATTEMPTS):
        if _lock_text(directory) == text:
            return not text or os.access(directory, os.W_OK)
        if attempt < ATTEMPTS - 1:
            time.sleep(PAUSE)
            with suppress(OSError):
                [*directory.parent.iterdir()]  # makes NFS ask the server
    return False


def _lock_text(directory: Path) -> str:
    """The name of the process that writes the directory; "" for a complete artifact on a read-only disk."""
    try:
        return (directory / LOCK_FILE).read_text()
    except OSError:
        return ""


def _raise_on_rank_0(cause: str, remedy: str) -> None:
    raise InputError(cause, remedy) if rank() == 0 else OtherRankError
