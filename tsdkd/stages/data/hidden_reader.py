"""The interface of a reader: sequences of ids in, hidden states out. It stands for a model outside this process."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from tsdkd.core import Head


class HiddenReader(ABC):
    """A model that reads; its head is in this process."""

    name: str
    head: Head

    @abstractmethod
    def start(self, sequences: Sequence[Sequence[int]]) -> None:
        """Begin to read. `finish` must come before the next call."""

    @abstractmethod
    def finish(self) -> list[Tensor]:
        """The hidden states after the last norm (tokens, width) of each sequence, on the CPU."""
