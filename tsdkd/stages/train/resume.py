"""The steps that the Trainer saves while it trains: which are intact, and the state they carry beside its own.

A power cut can leave any file of a step empty, short or changed. So all files are on disk and hashed before the mark
that makes a step whole is written, and every hash is checked before a file is loaded.
"""

import json
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from tsdkd.artifacts.disk import fsync, replace_text
from tsdkd.artifacts.hashing import file_digest, json_digest
from tsdkd.artifacts.json_files import parse_json, read_regular_file
from tsdkd.errors import TsdkdError
from tsdkd.processes import rank, world_size

STATE_FILE = "tsdkd_state.json"
"""The mark of a whole step, written last: bytes and SHA-256 of every other file, our states, and its own SHA-256."""
MAX_STATE_BYTES = 1 << 32
"""Of `STATE_FILE`; a replay buffer of 1,000 long responses has 40 MB."""


class Stateful(Protocol):
    """An object whose state is saved with each step."""

    def state_dict(self) -> dict[str, Any]:
        """The state of all ranks, which call it together; that of rank 0 is saved."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class StateCallback(TrainerCallback):
    """Completes every saved step with `STATE_FILE`, then deletes steps that are not needed any more."""

    def __init__(self, stateful: Mapping[str, Stateful]) -> None:
        self.stateful = stateful

    def restore(self, step: Path) -> None:
        """Load the states that a saved step carries."""
        states = _read_mark(step)["states"]
        for name, stateful in self.stateful.items():
            stateful.load_state_dict(states[name])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set the path of the best step: the Trainer records the path at saving, and the run directory may have moved.

        `find_intact_step` has checked the step.
        """
        if state.best_global_step:
            state.best_model_checkpoint = str(_step_path(args.output_dir, state.best_global_step))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Every rank must call it: the ranks divide the hashing, after all of them have written their files."""
        step = _step_path(args.output_dir, state.global_step)
        if world_size() > 1:
            PartialState().wait_for_everyone()
        names = _files(step)
        if world_size() > 1:
            names = sorted({*gather_object(names)})  # a host may see files of another one late
        own = _sync_and_hash(step, names[rank() :: world_size()])
        by_rank = gather_object([own]) if world_size() > 1 else [own]
        states = {name: stateful.state_dict() for name, stateful in self.stateful.items()}
        if state.is_world_process_zero:
            files = {name: digest for digests in by_rank for name, digest in digests.items()}
            _write_mark(step, files, states)
            _delete_old_steps(step.parent, state.best_global_step)


class FoundStep(NamedTuple):
    """The step that training continues after, and the faults of newer ones."""

    path: Path | None
    faults: str
    """The unusable steps with their faults, in words; empty without one."""


def find_intact_step(directory: Path) -> FoundStep:
    """The newest saved step that is intact, with its best step; newer ones are deleted. Every rank must call it.

    Rank 0 reads and hashes every file, up to those of the step that it finds.
    """
    found = FoundStep(None, "")
    if rank() == 0:
        found = _find_intact_step(directory)
    if world_size() > 1:
        (found,) = broadcast_object_list([found])
    return found


def has_saved_step(directory: Path) -> bool:
    """Whether a directory holds a whole step, intact or not."""
    return any(directory.glob(f"checkpoint-*/{STATE_FILE}"))


def require_intact(step: Path) -> None:
    """Raises TsdkdError if a saved step has been damaged since it was saved."""
    if rank() == 0 and (fault := _find_fault(step)):
        raise TsdkdError(
            f"Saved step {step_number(step)} is damaged ({fault}).",
            "Run the same command again: it continues after an intact step.",
        )


def step_number(step: Path) -> int:
    """The number in a saved step's name, such as 40 in "checkpoint-40"."""
    return int(step.name.split("-")[1])


def _step_path(directory: str | Path | None, number: int) -> Path:
    return Path(str(directory)) / f"checkpoint-{number}"


def _steps(directory: Path) -> list[Path]:
    """The directories of saved steps, oldest first."""
    named = (path for path in directory.glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", path.name))
    return sorted(filter(Path.is_dir, named), key=step_number)


def _files(step: Path) -> list[str]:
    """The files of a saved step, by their paths in it; the mark is not one of them."""
    names = [str(file.relative_to(step)) for file in step.rglob("*") if file.is_file()]
    return sorted(name for name in names if name != STATE_FILE)


def _sync_and_hash(step: Path, names: list[str]) -> dict[str, list[Any]]:
    """Flush files to disk. Returns bytes and SHA-256 of each."""

    def sync_and_hash(name: str) -> list[Any]:
        fsync(step / name)
        return [(step / name).stat().st_size, file_digest(step / name)]

    with ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(sync_and_hash, names), strict=True))


def _write_mark(step: Path, files: Mapping[str, list[Any]], states: Mapping[str, Any]) -> None:
    content = json.loads(json.dumps({"files": files, "states": states}))  # with the types that reading returns
    for path in (*(path for path in step.rglob("*") if path.is_dir()), step, step.parent, step.parent.parent):
        fsync(path)
    replace_text(step / STATE_FILE, json.dumps(content | {"sha256": json_digest(content)}))


def _read_mark(step: Path) -> dict[str, Any]:
    """Raises FileNotFoundError, and ValueError for a file that `_write_mark` does not write."""
    content = read_regular_file(step / STATE_FILE, MAX_STATE_BYTES)
    mark: dict[str, Any] = parse_json(content, dict[str, Any], finite=False)
    return mark


def _delete_old_steps(directory: Path, best: int | None) -> None:
    """Keep the newest step, and the best one or the one before the newest."""
    *older, _ = _steps(directory)
    kept = [step for step in older if step_number(step) == best] or older[-1:]
    for step in older:
        if step not in kept:
            _delete(step)


def _delete(step: Path) -> None:
    (step / STATE_FILE).unlink(missing_ok=True)  # first, so that a kill leaves no step that seems damaged
    shutil.rmtree(step)


def _find_intact_step(directory: Path) -> FoundStep:
    faults: list[str] = []
    for step in reversed(_steps(directory)):
        fault = _find_fault(step) or _find_fault_of_best(step)
        if fault is None:
            return FoundStep(step, ", ".join(faults))
        faults.append(f"{step_number(step)} ({fault})")
        _delete(step)
    return FoundStep(None, ", ".join(faults))


def _find_fault_of_best(step: Path) -> str | None:
    best = TrainerState.load_from_json(str(step / TRAINER_STATE_NAME)).best_global_step
    fault = best and best != step_number(step) and _find_fault(_step_path(step.parent, best))
    return f"its best step {best}: {fault}" if fault else None


def _find_fault(step: Path) -> str | None:
    """What is wrong with a saved step, in words; None for an intact one."""
    try:
        mark = _read_mark(step)
    except FileNotFoundError:
        return "not saved to its end" if step.is_dir() else "missing"
    except ValueError:
        return f"{STATE_FILE} is damaged"
    if mark.pop("sha256", None) != json_digest(mark):
        return f"{STATE_FILE} is damaged"
    files: dict[str, list[Any]] = mark["files"]
    found = _files(step)
    for name in sorted({*files}.symmetric_difference(found)):
        return f"{name} is missing" if name in files else f"{name} does not belong to it"
    same_size = [name for name in found if (step / name).stat().st_size == files[name][0]]
    with ThreadPoolExecutor() as threads:
        digests = dict(zip(same_size, threads.map(file_digest, [step / name for name in same_size]), strict=True))
    return next((f"{name} is damaged" for name in found if digests.get(name) != files[name][1]), None)
