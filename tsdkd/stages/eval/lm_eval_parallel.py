"""The model that lm-eval evaluates when workers hold copies of it: each of their tasks is one batch of requests.

A worker plans the batches that one process would form, so that results do not depend on the number of workers.
Imports lm-eval, so other modules import it late.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import Collator
from transformers import PreTrainedTokenizerBase

from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.eval.evaluated_model import EvaluatedModel
from tsdkd.stages.eval.harness import lm_eval_backends
from tsdkd.stages.eval.response_tracking import ResponseTracking, TrackedResponse
from tsdkd.stages.models.attributes import replaced_attribute
from tsdkd.stages.models.tokenizers import load_tokenizer
from tsdkd.stages.observer import Observer
from tsdkd.stages.parallel.pool import Pool
from tsdkd.stages.parallel.tasks import Advance, Finish, OpenHandler
from tsdkd.stages.results.benchmark import Sampling


@dataclass(frozen=True, slots=True)
class RequestTask:
    """Requests of one benchmark, as a worker receives them."""

    kind: str
    """lm-eval's name of their method: "generate_until" or "loglikelihood"."""
    arguments: Sequence[tuple[Any, ...]]
    sampling: Sampling
    seed: int
    whole_prompts: bool
    sample_numbers: Sequence[int] = ()
    """Of each request, among those with the same prompt."""
    is_plan: bool = False
    """The result is the batches; nothing is computed."""


class PlannedBatchesError(Exception):
    """Ends a call of lm-eval's model when it has formed its batches."""

    def __init__(self, batches: list[list[int]]) -> None:
        super().__init__(f"{len(batches)} batches")
        self.batches = batches


class PlanningCollator(Collator):
    """Raises `PlannedBatchesError` with the numbers of each batch's requests in place of the first batch."""

    def get_batched(self, *args: Any, **settings: Any) -> Iterator[Any]:
        batches = list[list[int]]()
        for batch in super().get_batched(*args, **settings):
            if self._group_by == "contexts":  # requests with the same logits are computed once
                groups = (self._arr_with_indices[tuple(self._group_fn((None, request)))] for request in batch)
                batches.append([number for group in groups for number, _ in group])
            else:
                start = sum(map(len, batches))
                batches.append(self._reorder_indices[start : start + len(batch)])
        raise PlannedBatchesError(batches)
        yield  # makes this a generator: lm-eval opens its bar before the first batch


@dataclass(frozen=True, slots=True)
class OpenLmEvalModel:
    """Opens the model of a worker."""

    name: str
    config: EvalConfig
    chat: bool

    @contextmanager
    def __call__(self, observer: Observer) -> Iterator[Callable[[RequestTask | None, Advance], Finish]]:
        config = replace(self.config, data_parallel=None, ray=None)
        with closing(EvaluatedModel(self.name, config, self.chat, observer)) as evaluated:

            def run(task: RequestTask | None, advance: Advance) -> Finish:
                """The longest sequence of the model without a task."""
                model = evaluated.lm_eval_model
                result = model.max_length if task is None else run_requests(model, task, advance)
                return lambda: result

            yield run


def run_requests(model: Any, task: RequestTask, advance: Advance) -> Any:
    """The results of a task with its truncated prompts, or its plan."""
    requests = [Instance(task.kind, {}, arguments, 0) for arguments in task.arguments]
    model.start_benchmark(task.sampling, task.seed, task.whole_prompts, task.sample_numbers)
    call = model.respond if task.kind == "generate_until" else model.loglikelihood
    if task.is_plan:
        return plan_batches(lambda: call(requests, True))
    model.request_progress.advance = advance
    results = call(requests, True)
    if not model.request_progress.counted_by_engine:
        advance(len(requests))
    return results, {*model.response_log.truncated_prompts}


def plan_batches(call: Callable[[], Any]) -> list[list[int]]:
    """The batches that a call of lm-eval's model forms."""
    with ExitStack() as stack:
        for module in lm_eval_backends():
            stack.enter_context(replaced_attribute(module, "Collator", PlanningCollator))
        try:
            call()
        except PlannedBatchesError as planned:
            return planned.batches
    raise AssertionError("lm-eval's model forms its batches without Collator")


class ParallelModel(ResponseTracking, LM):
    """Divides the requests of lm-eval among workers."""

    def __init__(self, pool: Pool, name: str, config: EvalConfig, chat: bool) -> None:
        super().__init__()
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(name, config.chat)
        self.chat_template_args: dict[str, Any] = {}
        self._pool = pool
        self._open: OpenHandler = OpenLmEvalModel(name, config, chat)
        self.start_tracking(name, len(self.tokenizer), config.dtype)
        lengths = list[int]()
        pool.run(self._open, [None], lambda _, length: lengths.append(length))
        (self.max_length,) = lengths

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._run("loglikelihood", requests, [])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("no benchmark asks for it")

    def respond(self, requests: list[Any], disable_tqdm: bool = False) -> list[TrackedResponse]:
        counts, numbers = Counter[str](), []
        for request in requests:
            numbers.append(counts[request.args[0]])
            counts[request.args[0]] += 1
        return self._run("generate_until", requests, numbers)

    def _run(self, kind: str, requests: list[Any], sample_numbers: list[int]) -> list[Any]:
        """The results of all requests, in their order."""
        settings: Any = {"sampling": self.sampling, "seed": self._seed, "whole_prompts": self._whole_prompts}
        arguments, batches = [request.args for request in requests], list[list[int]]()
        plan = RequestTask(kind, arguments, **settings, is_plan=True)
        self._pool.run(self._open, [plan], lambda _, planned: batches.extend(planned))
        tasks = [
            RequestTask(
                kind,
                [arguments[i] for i in batch],
                **settings,
                sample_numbers=[sample_numbers[i] for i in batch] if sample_numbers else (),
            )
            for batch in batches
        ]
        batch_of, results = dict(zip(map(id, tasks), batches, strict=True)), dict[int, Any]()

        def collect(task: RequestTask, done: tuple[list[Any], set[str]]) -> None:
            results.update(zip(batch_of[id(task)], done[0], strict=True))
            self.response_log.truncated_prompts |= done[1]

        with closing(self.request_progress.open_bar(len(requests))):
            self._pool.run(self._open, tasks, collect, self.request_progress.forward)
        return [results[i] for i in range(len(requests))]
