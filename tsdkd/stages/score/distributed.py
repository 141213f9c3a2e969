"""The ranks of a distributed run (torchrun, accelerate launch), which write one artifact together.

The main rank prepares and finishes the artifact, all ranks write parts. A single process is the main rank and never
waits.
"""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from tsdkd.artifacts.manifest import Manifest
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import OtherRankError
from tsdkd.stages.models.device import default_device

TIMEOUT = timedelta(hours=12)
"""The longest wait for another rank's last part."""


class RankGroup:
    """All ranks of this run."""

    def __init__(self) -> None:
        self._state = PartialState(cpu=default_device() == "cpu", timeout=TIMEOUT)
        self.is_main: bool = self._state.is_main_process

    def wait(self) -> None:
        """Wait for all ranks. Raises OtherRankError when another rank has failed."""
        try:
            self._state.wait_for_everyone()
        except RuntimeError:  # the connection to the failed rank is closed
            raise OtherRankError from None

    def open_writer(self, output: Path, prepare: Callable[[], Manifest], overwrite: bool) -> Writer:
        """Open one artifact on every rank; the main rank alone calls `prepare`, and raises its errors."""
        if not self.is_main:
            return Writer.join(self._receive(None))
        writer = Writer.open(output, prepare(), overwrite=overwrite)
        writer.share()
        self._receive(writer.path)
        return writer

    def _receive(self, path: Path | None) -> Path:
        """The path that the main rank broadcasts. Raises OtherRankError when another rank has failed."""
        try:
            received: list[Path] = broadcast_object_list([path])
        except RuntimeError:  # the connection to the failed rank is closed
            raise OtherRankError from None
        return received[0]
