"""Ctrl-C and SIGTERM during training: the step is finished and saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsdkd.stages.observer import Observer


class InterruptCallback(TrainerCallback):
    """Saves and stops at the end of the step in which any rank set `requested`."""

    requested = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if args.world_size > 1:
            self.requested = any(gather_object([self.requested]))
        if self.requested:
            control.should_save = control.should_training_stop = True


@contextmanager
def stopping_on_signals(interrupt: InterruptCallback, observer: Observer) -> Iterator[None]:
    """Ctrl-C and SIGTERM finish and save the step; a second Ctrl-C stops at once.

    A second SIGTERM does nothing: a batch system sends it to a process and to its launcher, which passes it on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request(number: int, _: object) -> None:
        again = ""
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT])
            again = " Press Ctrl-C again to stop now."
        if not interrupt.requested:
            interrupt.requested = True
            observer.info(f"Interrupted: training stops once this step is saved.{again}")

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
