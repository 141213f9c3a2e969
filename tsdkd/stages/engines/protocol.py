"""From prompts to the parts of a rollouts artifact: which prompts stay, who answers each, with which seed."""

from collections.abc import Callable, Iterator
from typing import Protocol

from tsdkd.stages.data.requests import AnyRequestBatch, Response


class Engine(Protocol):
    def sample(
        self, parts: Iterator[AnyRequestBatch], advance: Callable[[int], None]
    ) -> Iterator[tuple[AnyRequestBatch, list[Response]]]:
        """Every part with its responses in the requests' order, as they finish; `advance` is called with responses done.

        The same part gets the same responses, whatever came before it.
        """
