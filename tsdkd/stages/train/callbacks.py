"""Callbacks of the Trainer: progress on screen, the log, health and replays."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsdkd.stages.data.replay import ReplaySchedule
from tsdkd.stages.metrics.health import HealthMonitor, WeightMonitor, degeneration_warning
from tsdkd.stages.metrics.log import is_evaluation, is_step, log_line, times_line
from tsdkd.stages.metrics.names import HELD_OUT_METRICS, METRICS, SCREEN_METRICS, metric, with_own_terms
from tsdkd.stages.metrics.step_times import timed
from tsdkd.stages.observer import Observer


class ProgressCallback(TrainerCallback):
    """Shows optimizer steps and their metrics on a progress bar, which `stack` closes."""

    def __init__(self, observer: Observer, stack: ExitStack) -> None:
        self.observer = observer
        self.stack = stack

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        bar = self.observer.progress("training", state.max_steps, "steps", state.global_step)
        self.advance = self.stack.enter_context(bar)
        if state.max_steps < 3 and args.get_warmup_steps(state.max_steps):
            self.observer.warning(
                f"The first of {state.max_steps} steps has learning rate 0. Lower --warmup-ratio to change it."
            )
        for entry in state.log_history:  # of the session that is resumed
            self._show(entry)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.advance(1)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        self._show(logs)
        if is_evaluation(logs):
            measured = [f"{METRICS[name].label} {logs[name]:.4f}" for name in HELD_OUT_METRICS if name in logs]
            self.observer.info(f"step {state.global_step}: {', '.join(measured)}")

    def _show(self, logs: dict[str, float]) -> None:
        if shown := {metric(name).label: logs[name] for name in with_own_terms(SCREEN_METRICS, logs)}:
            self.observer.metrics(shown)


class ReplayCallback(TrainerCallback):
    """Passes each held-out divergence to the replay schedule before the step is saved."""

    def __init__(self, schedule: ReplaySchedule, observer: Observer) -> None:
        self.schedule = schedule
        self.observer = observer

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        before = self.schedule.phi
        self.schedule.update(more["metrics"]["eval_kl"])
        if self.schedule.phi > before:
            self.observer.info(
                f"step {state.global_step}: phi, the probability of the student's own responses, "
                f"rises to {self.schedule.phi:.2f}"
            )


class LogCallback(TrainerCallback):
    """Appends every log entry to a file, and a step's times to another; a resumed run cuts both to its saved step."""

    def __init__(self, metrics: Path, times: Path) -> None:
        self.metrics, self.times = metrics, times

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.metrics.write_text("".join(map(log_line, state.log_history)))
            self.times.write_text("".join(map(times_line, filter(is_step, state.log_history))))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if state.is_world_process_zero:
            entry = {**logs, "step": state.global_step}
            with self.metrics.open("a") as file:
                file.write(log_line(entry))
            if is_step(entry):
                with self.times.open("a") as file:
                    file.write(times_line(entry))


class OptimizerTimesCallback(TrainerCallback):
    """Counts the optimizer's update as a part of the step's time."""

    def __init__(self) -> None:
        self._part = ExitStack()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._part.enter_context(timed("optimizer"))

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._part.close()


class HealthCallback(TrainerCallback):
    """Warns once of each sign that the run degenerates; with `stop`, ends the run before that step is saved.

    It also warns of the first step in which no token has a weight, and at the end of a run without any.
    """

    def __init__(self, observer: Observer, *, stop: bool) -> None:
        self.observer = observer
        self.stop = stop
        self.monitor, self.weights = HealthMonitor(), WeightMonitor()
        self.stopped_at: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for entry in filter(is_step, state.log_history):  # of the session that is resumed, which warned itself
            self.monitor.update(entry)
            self.weights.update(entry)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        if not is_step(logs):
            return
        if self.weights.update(logs):
            self.observer.warning(self.weights.step_warning(state.global_step))
        signs = self.monitor.update(logs)
        for sign in signs:
            if sign.is_new:
                self.observer.warning(degeneration_warning(state.global_step, sign.text))
        if signs and self.stop:
            self.stopped_at = state.global_step
            control.should_training_stop, control.should_save, control.should_evaluate = True, False, False

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.weights.found_none:
            self.observer.warning(self.weights.run_warning())
