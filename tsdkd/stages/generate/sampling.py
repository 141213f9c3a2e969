"""The handler of generate's tasks: an engine that samples the responses of one part."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.requests import Request, RequestBatch, Response
from tsdkd.stages.engines.choice import open_engine
from tsdkd.stages.engines.engine_check import check_engine
from tsdkd.stages.models.spec import ModelSpec
from tsdkd.stages.observer import Observer
from tsdkd.stages.parallel.tasks import Advance, one_at_a_time


@dataclass(frozen=True, slots=True)
class OpenSampler:
    """Opens the engine of one author, and checks it."""

    author: str
    models: Mapping[str, ModelSpec]
    """By role."""
    config: GenerateConfig
    max_tokens: int
    """Of the longest sequence."""
    checked: list[Request]
    """Requests of the engine check."""

    @contextmanager
    def __call__(self, observer: Observer) -> Iterator[Callable[[RequestBatch, Advance], Callable[[], list[Response]]]]:
        """Raises TsdkdError when the engine fails or disagrees with transformers."""
        with open_engine(self.author, self.models, self.config, self.max_tokens, observer) as engine:
            with one_at_a_time():
                check_engine(engine, self.checked, self.models, self.author, self.config)

            def sample(batch: RequestBatch, advance: Advance) -> Callable[[], list[Response]]:
                ((_, responses),) = engine.sample(iter([batch]), advance)
                return lambda: responses

            yield sample
