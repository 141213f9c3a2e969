"""A benchmark: an lm-eval task with its shots, a headline metric, a limit on new tokens and a way of sampling.

Imports neither lm-eval nor torch. `stages/eval/lm_eval_tasks.py` turns a benchmark into task files for lm-eval.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsdkd.stages.config.eval import EvalConfig


class FunctionName(str):
    """The dotted name of a Python function that lm-eval imports."""

    __slots__ = ()


def mean_metrics(*names: str) -> list[dict[str, Any]]:
    """lm-eval's `metric_list` for metrics whose mean over documents counts."""
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def extraction(name: str, function: str) -> list[dict[str, Any]]:
    """lm-eval's `filter_list` with one filter, in which our `function` extracts the answer from a response."""
    steps = [{"function": "custom", "filter_fn": FunctionName(function)}, {"function": "take_first"}]
    return [{"name": name, "filter": steps}]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are sampled; the defaults are one greedy response per document."""

    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    """Responses per document."""


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark; a variant of it is named BENCHMARK:VARIANT."""

    name: str
    shots: int
    metric: str
    """The headline, in lm-eval's form "metric,filter"."""
    other_metrics: tuple[str, ...] = ()
    """Metrics reported beside the headline."""
    stock_files: tuple[str, ...] = ()
    """lm-eval's task files, as patterns below lm_eval/tasks; empty when `overrides` define the whole task."""
    dataset: str = ""
    """The directory below --data that holds a copy of the hub dataset; empty for data that tsdkd includes."""
    split: str = "test"
    """The split whose documents are evaluated."""
    question: str = "question"
    """The column of the dataset that holds the text of a question."""
    max_new_tokens: int | None = None
    """The limit of a response; None for multiple choice."""
    sampling: Sampling = GREEDY
    """How responses are sampled where no option says otherwise."""
    chat_stops: tuple[str, ...] = ()
    """Stop strings of responses in a chat template, where the end of the turn ends a response. The task's own stop
    strings ("Question:", ...) apply to prompts without a chat template: they would cut a response that restates its
    prompt."""
    whole_prompts: bool = False
    """A prompt that leaves no space for the longest response is refused, not truncated on the left."""
    runs_code: bool = False
    gated: str = ""
    """The hub dataset whose terms a user must accept."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Settings that replace those of the stock files."""

    def local_dataset(self, data: Path | None) -> Path | None:
        """The copy of the dataset below `data`; None when the hub or tsdkd itself provides it."""
        return data / self.dataset if data is not None and self.dataset else None

    def response_limit(self, given: int | None) -> int:
        """The longest response in tokens, where `given` replaces the benchmark's own limit; 0 for multiple choice."""
        return given or self.max_new_tokens if self.max_new_tokens else 0

    def choose_sampling(self, config: EvalConfig) -> Sampling:
        """The benchmark's own sampling, with the values that options give in its place; greedy at temperature 0."""
        own = self.sampling
        chosen = Sampling(
            own.temperature if config.temperature is None else config.temperature,
            own.top_p if config.top_p is None else config.top_p,
            own.samples if config.samples is None else config.samples,
        )
        return chosen if chosen.temperature else GREEDY

    @property
    def file_stem(self) -> str:
        return self.name.replace(":", "-")

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of a prompt's messages in a chat template, without a system message."""
        continued = ("assistant",) if self.overrides.get("gen_prefix") else ()
        return ("user", "assistant") * self.shots + ("user", *continued)

    @property
    def base(self) -> str:
        """The name without its variant."""
        return self.name.partition(":")[0]
