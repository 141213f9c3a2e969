"""The interface of every engine: batches of requests in, responses out."""

from collections.abc import Callable, Iterator
from typing import Protocol

from tsdkd.stages.data.requests import AnyRequestBatch, Response


class Engine(Protocol):
    """A model, or two, ready to sample."""

    def sample(
        self, batches: Iterator[AnyRequestBatch], advance: Callable[[int], None]
    ) -> Iterator[tuple[AnyRequestBatch, list[Response]]]:
        """Yield each batch with its responses, in the order of its requests.

        `advance` receives the number of responses just finished. The same batch always gets the same responses,
        whatever was sampled before it.
        """
