"""Every metric of training by its key in the log, with the label and unit that screen, model card and report show."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from tsdkd.core.config import TERMS
from tsdkd.errors import InputError
from tsdkd.stages.methods.values import require_name


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is shown."""

    label: str
    unit: str


METRICS = {
    "loss": Metric("loss", "nats"),
    "indirect": Metric("indirect", "nats"),
    "direct": Metric("direct", "nats"),
    "entropy": Metric("entropy", "nats"),
    "policy_gradient": Metric("policy gradient", "nats"),
    "student_entropy": Metric("student entropy", "nats per token"),
    "teacher_entropy": Metric("teacher entropy", "nats per token"),
    "top1_agreement": Metric("top-1 agreement", "fraction of tokens"),
    "rank_agreement": Metric("rank agreement", "Kendall's tau"),
    "student_outside_mass": Metric("student outside mass", "probability"),
    "teacher_outside_mass": Metric("teacher outside mass", "probability"),
    "candidate_overlap": Metric("candidate overlap", "fraction of candidates"),
    "drift": Metric("drift", "nats per token"),
    "rollout_age": Metric("rollout age", "updates"),
    "gate": Metric("gate", "mean over tokens"),
    "response_length": Metric("response length", "tokens"),
    "opener_length": Metric("opener length", "tokens"),
    "truncated": Metric("truncated", "fraction of responses"),
    "repeating": Metric("repeating", "fraction of responses"),
    "indirect_grad_share": Metric("indirect grad share", "fraction of the terms' norms"),
    "direct_grad_share": Metric("direct grad share", "fraction of the terms' norms"),
    "entropy_grad_share": Metric("entropy grad share", "fraction of the terms' norms"),
    "policy_gradient_grad_share": Metric("policy gradient share", "fraction of the terms' norms"),
    "grad_norm": Metric("gradient norm", "norm before clipping"),
    "learning_rate": Metric("learning rate", "rate"),
    "eval_kl": Metric("held-out KL", "nats per token"),
    "eval_cross_entropy": Metric("held-out cross-entropy", "nats per token"),
    "eval_top1_agreement": Metric("held-out top-1 agreement", "fraction of tokens"),
    "eval_student_entropy": Metric("held-out student entropy", "nats per token"),
}
"""A measurement on held-out prompts logs the keys that begin with "eval_"; an optimizer step logs the others."""

SELECTED = "_selected"
"""Ends the key of the fraction of tokens that have a weight in one of a method's own losses."""
_RESERVED, _SUFFIXES = ("eval_", "train_", "epoch", "step", "total_"), ("_grad_share", "_grad_norm", "_grad_square")
TERM_METRICS = ("loss", *TERMS)
GRAD_SHARE_METRICS = tuple(f"{term}_grad_share" for term in TERMS)
HELD_OUT_METRICS = ("eval_kl", "eval_cross_entropy", "eval_top1_agreement")
SCREEN_METRICS = (
    *TERM_METRICS,
    *GRAD_SHARE_METRICS,
    "student_entropy",
    "rank_agreement",
    "student_outside_mass",
    "teacher_outside_mass",
    "response_length",
    "grad_norm",
    "eval_kl",
    "eval_cross_entropy",
)
CARD_METRICS = (*TERM_METRICS, "student_entropy", "top1_agreement", "grad_norm")
SUMMARY_METRICS = (*TERM_METRICS, "student_entropy", "candidate_overlap", "drift")
"""The first and last value of each is in a checkpoint's manifest."""


def metric(name: str) -> Metric:
    """How a metric is shown, also one of a method's own losses, which the method names."""
    if name in METRICS:
        return METRICS[name]
    for suffix, words, unit in (
        (SELECTED, "selected tokens", "fraction of tokens"),
        ("_grad_share", "grad share", "fraction of the terms' norms"),
    ):
        if name.endswith(suffix):
            return Metric(f"{name.removesuffix(suffix)} {words}", unit)
    return Metric(name, "nats")


def require_term_names(names: Iterable[str]) -> None:
    """Raise InputError for a loss with the name of another entry of the log."""
    for name in names:
        require_name("loss", name)
        if name in METRICS.keys() - TERMS.keys() or name.startswith(_RESERVED) or name.endswith((SELECTED, *_SUFFIXES)):
            raise InputError(f"The loss {name} has the name of another entry of the log.", "Give it another name.")


def own_terms(names: Iterable[str]) -> list[str]:
    """The losses of a method's own among the keys of a log entry or a summary."""
    return [name.removesuffix(SELECTED) for name in names if name.endswith(SELECTED)]


def with_own_terms(metrics: Sequence[str], entry: Collection[str]) -> list[str]:
    """Those of the metrics that an entry has, with a method's own losses after the loss."""
    first, *others = metrics
    own = sorted(set(own_terms(entry)) - {*metrics})
    return [name for name in (first, *own, *others) if name in entry]


def teacher_metric(name: str, teacher: str) -> str:
    """The key of a metric of one of several teachers; trackers group keys at each slash."""
    return f"{name}/{teacher}"


def metric_teacher(key: str) -> str:
    """The name of the teacher whose metric a key holds; "" for a metric of all responses."""
    return key.partition("/")[2]
