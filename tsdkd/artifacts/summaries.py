"""The summary that the manifest of each kind of artifact holds."""

from typing import Annotated, Any, TypedDict

from tsdkd.artifacts.rules import Count


def _are_numbers(summary: dict[str, Any]) -> str:
    named = (key for key in summary if key.endswith(("_first", "_last")) or key.startswith("best_"))
    wrong = next((key for key in named if type(summary[key]) not in {int, float}), "")
    return f"has {wrong} {str(summary[wrong])[:60]!r}, not a number" if wrong else ""


def _holds_numbers(summary: dict[str, Any]) -> str:
    wrong = next((key for key, value in summary.items() if key != "teachers" and type(value) not in {int, float}), "")
    return f"has {wrong[:60]} {str(summary[wrong])[:60]!r}, not a number" if wrong else ""


class RolloutsSummary(TypedDict, total=False):
    """Counts of prompts, responses and tokens."""

    prompts: Count
    prompts_skipped: dict[str, Count]
    responses: Count
    response_tokens: Count
    teacher_tokens: Count
    truncated: Count
    turns: Count
    turns_skipped: dict[str, Count]
    split_conversations: Count
    context_tokens: Count


class ScoresSummary(TypedDict, total=False):
    """Counts and means per response token, all numbers; also of each teacher with a name."""

    teachers: dict[str, dict[str, float]]


class CheckpointSummary(TypedDict, total=False):
    """The summary of training or pruning; training adds the first, the last and the best value of each metric."""

    steps: Count
    best_step: Count
    degenerated_at: Count
    layers: Count
    dropped_layers: list[Count]
    kl_after_each: list[float]
    teachers: dict[str, dict[str, float]]


class MeasuredSummary(TypedDict, total=False):
    """The summary of one benchmark, or of the held-out responses, whose divergences have further keys."""

    metric: str
    value: float
    stderr: float | None
    documents: Count
    other_metrics: dict[str, list[float | None]]
    shots: Count
    truncated: Count
    prompts_truncated: Count
    stopped_by: dict[str, Count]
    sandbox_limits: dict[str, Count]
    judged_by_objects: Count
    max_new_tokens: Count
    temperature: float
    top_p: float
    samples: Count
    pass_at: dict[str, list[float | None]]
    chat_template: bool
    responses: Count
    tokens: Count
    kl: float
    kl_stderr: float
    top1_agreement: float
    entropy: float
    teachers: dict[str, dict[str, float]]
    prompt: str
    response: str


SUMMARIES: dict[str, Any] = {
    "rollouts": RolloutsSummary,
    "scores": Annotated[ScoresSummary, _holds_numbers],
    "checkpoint": Annotated[CheckpointSummary, _are_numbers],
    "results": dict[str, MeasuredSummary],
}
