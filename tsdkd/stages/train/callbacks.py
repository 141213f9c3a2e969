"""What happens beside the steps of training: saves are marked whole, logs are shown, written and judged."""

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsdkd.stages.data.replay import ReplaySchedule
from tsdkd.stages.metrics.health import HealthMonitor, degeneration_warning
from tsdkd.stages.observer import Observer

COMPLETE_MARK = "tsdkd_state.json"
"""Written last into each of the Trainer's checkpoints, with all its files: one without it, or them, was cut off."""
SHOWN = {
    "loss": "loss",
    "indirect": "ranking",
    "direct": "divergence",
    "entropy": "top entropies",
    "policy_gradient": "long range",
    "student_entropy": "student entropy",
    "rank_agreement": "rank agreement",
    "response_length": "response length",
    "grad_norm": "gradient norm",
    "eval_kl": "held-out KL",
}
"""Of each log, in this order, by the names they are shown under."""


class Stateful(Protocol):
    """What a step's saved state must carry beside the Trainer's own."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class MarkComplete(TrainerCallback):
    """Ends every save with `SAVED`, which also carries the states of what is named."""

    def __init__(self, kept: Mapping[str, Stateful]) -> None:
        self.kept = kept

    def restore(self, checkpoint: Path) -> None:
        states = json.loads((checkpoint / COMPLETE_MARK).read_text())["states"]
        for name, stateful in self.kept.items():
            stateful.load_state_dict(states[name])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            place = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            content = {
                "files": sorted(str(file.relative_to(place)) for file in place.rglob("*") if file.is_file()),
                "states": {name: stateful.state_dict() for name, stateful in self.kept.items()},
            }
            aside = place / f"{COMPLETE_MARK}.tmp"
            aside.write_text(json.dumps(content))
            aside.replace(place / COMPLETE_MARK)


class ShowProgress(TrainerCallback):
    """Optimizer steps and what they log, on a bar that `stack` closes."""

    def __init__(self, observer: Observer, stack: ExitStack) -> None:
        self.observer = observer
        self.stack = stack

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        bar = self.observer.progress("student learns", state.max_steps, "steps", state.global_step)
        self.advance = self.stack.enter_context(bar)
        if state.max_steps < 3 and args.get_warmup_steps(state.max_steps):
            self.observer.warning(f"Of {state.max_steps} steps the first has learning rate 0: see --warmup-ratio.")
        for entry in state.log_history:  # of the steps before the one that is continued
            self._show(entry)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.advance(1)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        self._show(logs)
        if "eval_kl" in logs:
            self.observer.info(
                f"step {state.global_step}: KL to the teacher {logs['eval_kl']:.4f}, "
                f"top-1 agreement {logs['eval_agreement']:.3f} on held-out prompts"
            )

    def _show(self, logs: dict[str, float]) -> None:
        if shown := {label: logs[name] for name, label in SHOWN.items() if name in logs}:
            self.observer.metrics(shown)


class UpdateReplaySchedule(TrainerCallback):
    """Tells the schedule of replays what was measured, before that step is saved, and says when phi rises."""

    def __init__(self, schedule: ReplaySchedule, observer: Observer) -> None:
        self.schedule = schedule
        self.observer = observer

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        before = self.schedule.phi
        self.schedule.update(more["metrics"]["eval_kl"])
        if self.schedule.phi > before:
            self.observer.info(
                f"step {state.global_step}: phi, the share of the student's answers, is now {self.schedule.phi:.2f}"
            )


class WriteLog(TrainerCallback):
    """Every log as a line of JSON, while training goes on; steps after the one that is continued are cut."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.file.write_text("".join(map(log_line, state.log_history)))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if state.is_world_process_zero:
            with self.file.open("a") as file:
                file.write(log_line({**logs, "step": state.global_step}))


class MonitorHealth(TrainerCallback):
    """Says once for each sign that the run degenerates; may stop it before that step is saved."""

    def __init__(self, observer: Observer, *, stop: bool) -> None:
        self.observer = observer
        self.stop = stop
        self.watch = HealthMonitor()
        self.said: set[str] = set()
        self.stopped_at: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for entry in state.log_history:
            if "loss" in entry:
                self.said |= self.watch.see(entry).keys()  # by the session that is continued

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if "loss" not in logs:
            return
        signs = self.watch.see(logs)
        for name in (name for name in signs if name not in self.said):
            self.observer.warning(degeneration_warning(state.global_step, signs[name]))
        self.said |= signs.keys()
        if signs and self.stop:
            self.stopped_at = state.global_step
            control.should_training_stop, control.should_save, control.should_evaluate = True, False, False


class StopOnRequest(TrainerCallback):
    """Saves and stops at the end of the step during which `requested` was set, in any process."""

    requested = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.world_size > 1:
            self.requested = any(gather_object([self.requested]))
        if self.requested:
            control.should_save = control.should_training_stop = True


def log_line(entry: dict[str, float]) -> str:
    """One record of the log; "epoch" is left out, since it counts micro-batches."""
    return json.dumps({name: value for name, value in entry.items() if name != "epoch"}, sort_keys=True) + "\n"


def last_complete_checkpoint(directory: Path) -> Path | None:
    """The newest saved step; those that were cut off are removed."""
    whole = []
    for checkpoint in sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])):
        if _is_whole(checkpoint):
            whole.append(checkpoint)
        else:
            shutil.rmtree(checkpoint, ignore_errors=True)  # another process may be faster
    return whole[-1] if whole else None


def _is_whole(checkpoint: Path) -> bool:
    mark = checkpoint / COMPLETE_MARK
    return mark.is_file() and all((checkpoint / file).is_file() for file in json.loads(mark.read_text())["files"])
