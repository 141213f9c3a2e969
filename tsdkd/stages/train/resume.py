"""The steps that the Trainer saves while it trains: which are complete, and the state they carry beside its own."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tsdkd.artifacts.json_files import read_json
from tsdkd.artifacts.rules import PartName
from tsdkd.errors import TsdkdError

STATE_FILE = "tsdkd_state.json"
"""Written last into each saved step. It lists the other files; a step without it or one of them is incomplete."""


@dataclass(frozen=True, slots=True)
class SavedState:
    """The content of `STATE_FILE`."""

    files: tuple[PartName, ...]
    states: dict[str, Any]


class Stateful(Protocol):
    """An object whose state is saved with each step."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StateCallback(TrainerCallback):
    """Completes every saved step with `STATE_FILE`."""

    def __init__(self, stateful: Mapping[str, Stateful]) -> None:
        self.stateful = stateful

    def restore(self, step: Path) -> None:
        """Load the states that a saved step carries."""
        states = read_json(step / STATE_FILE, SavedState).states
        for name, stateful in self.stateful.items():
            stateful.load_state_dict(states[name])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set the path of the best step: the Trainer records the path at saving, and the run directory may have moved.

        Raises TsdkdError if the best step is missing, since the summary would report its measurements.
        """
        if state.best_global_step:
            best = Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}"
            if not _is_complete(best):
                raise TsdkdError(
                    f"The best step of this run, {state.best_global_step}, is missing at {best}.",
                    f"Restore it, or remove {best.parent} to train again.",
                )
            state.best_model_checkpoint = str(best)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            step = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            content = {
                "files": sorted(str(file.relative_to(step)) for file in step.rglob("*") if file.is_file()),
                "states": {name: stateful.state_dict() for name, stateful in self.stateful.items()},
            }
            temporary = step / f"{STATE_FILE}.tmp"
            temporary.write_text(json.dumps(content))
            temporary.replace(step / STATE_FILE)


def last_complete_step(directory: Path) -> Path | None:
    """The newest complete step in a directory; incomplete ones are deleted."""
    complete = []
    for step in sorted(directory.glob("checkpoint-*"), key=step_number):
        if _is_complete(step):
            complete.append(step)
        else:
            shutil.rmtree(step, ignore_errors=True)  # another rank may delete it first
    return complete[-1] if complete else None


def step_number(step: Path) -> int:
    """The number in a saved step's name, such as 40 in "checkpoint-40"."""
    return int(step.name.split("-")[1])


def _is_complete(step: Path) -> bool:
    state = step / STATE_FILE
    return state.is_file() and all((step / file).is_file() for file in read_json(state, SavedState).files)
