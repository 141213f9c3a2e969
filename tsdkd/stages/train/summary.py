"""The summary of training in a checkpoint's manifest: the first, the last and the best metrics."""

from typing import Any

from transformers import Trainer

from tsdkd.stages.metrics.log import is_evaluation, is_step
from tsdkd.stages.metrics.names import HELD_OUT_METRICS, SUMMARY_METRICS, metric_teacher, teacher_metric, with_own_terms


def training_summary(trainer: Trainer, degenerated_at: int | None) -> dict[str, Any]:
    """Steps and metrics of a run that has ended. `degenerated_at`: the step at which a degenerate run was stopped."""
    steps = list(filter(is_step, trainer.state.log_history))
    summary: dict[str, Any] = {"steps": len(steps)}
    for position, entry in (("first", steps[0]), ("last", steps[-1])):
        summary |= {f"{name}_{position}": entry[name] for name in with_own_terms(SUMMARY_METRICS, entry)}
    if trainer.state.best_metric is not None:
        name = str(trainer.args.metric_for_best_model).removeprefix("eval_")
        summary |= {"best_step": trainer.state.best_global_step, f"best_{name}": trainer.state.best_metric}
    summary |= {"teachers": teachers} if (teachers := _summary_by_teacher(trainer)) else {}
    return summary | ({} if degenerated_at is None else {"degenerated_at": degenerated_at})


def _summary_by_teacher(trainer: Trainer) -> dict[str, dict[str, float]]:
    """The first, the last and the best measurement on the held-out responses of each named teacher."""
    entries = list(filter(is_evaluation, trainer.state.log_history))
    if not entries:
        return {}
    best = next((entry for entry in entries if entry["step"] == trainer.state.best_global_step), entries[-1])
    summary: dict[str, dict[str, float]] = {}
    for name in filter(None, dict.fromkeys(map(metric_teacher, entries[0]))):
        summary[name] = {"tokens": entries[0][teacher_metric("eval_tokens", name)]}
        for metric in HELD_OUT_METRICS:
            key = teacher_metric(metric, name)
            if key in entries[0]:
                summary[name] |= {f"{metric}_first": entries[0][key], f"{metric}_last": entries[-1][key]}
                summary[name][metric.replace("eval_", "best_")] = best[key]
    return summary
