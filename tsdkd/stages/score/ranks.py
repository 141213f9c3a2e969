"""Several processes in one stage (torchrun, accelerate launch): the first prepares and ends it, all of them work.

A process alone is the first of one, and never waits.
"""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState

from tsdkd.artifacts.manifest import Manifest
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import OtherRankError
from tsdkd.stages.models.device import default_device

PATIENCE = timedelta(hours=12)
"""How long a process waits for the others' last part."""


class Ranks:
    """All processes of this run."""

    def __init__(self) -> None:
        self._state = PartialState(cpu=default_device() == "cpu", timeout=PATIENCE)
        self.count: int = self._state.num_processes
        self.first: bool = self._state.is_main_process

    def wait(self) -> None:
        """Until every process is here. Raises ToldElsewhereError when another has failed."""
        try:
            self._state.wait_for_everyone()
        except RuntimeError:  # its connection is gone
            raise OtherRankError from None

    def open(self, output: Path, prepare: Callable[[], Manifest], overwrite: bool) -> Writer:
        """A writer for each process to one artifact; only the first prepares its manifest, and can find fault."""
        if not self.first:
            self.wait()
            return Writer.join(output)
        writer = Writer.open(output, prepare(), overwrite=overwrite)
        writer.share()
        self.wait()
        return writer
