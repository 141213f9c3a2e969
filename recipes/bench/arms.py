"""The arms of a bench: one method with one learning rate and one seed, trained and measured."""

import json
import time
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from recipes.bench.methods import Entry
from recipes.bench.settings import Settings
from recipes.bench.tasks import BenchTask, Rows, find_task
from recipes.experiment.commands import run_tsdkd
from recipes.experiment.measures import RESULT, divergence, response_measures, training_health, write_result
from tsdkd.artifacts.files import TIMES_FILE
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.errors import InputError
from tsdkd.stages.metrics.log import METRICS_FILE, is_step, read_log

Split = Literal["validation", "test"]
SPLITS: tuple[Split, ...] = ("validation", "test")
PROBE_STEPS = 3


@dataclass(frozen=True)
class Arm:
    """An entry's training, or the student before it, and the split on which it is measured."""

    seed: int
    split: Split
    entry: Entry | None = None
    rate: float = 0.0

    @property
    def directory(self) -> Path:
        name = f"{self.entry.name}-{self.rate:g}" if self.entry else f"before-{self.split}"
        return Path(f"seed-{self.seed}") / name

    @property
    def is_complete(self) -> bool:
        """Raises InputError where the arm was run with another method or other options."""
        if not (file := self.directory / RESULT).is_file():
            return False
        recorded = json.loads(file.read_text()).get("entry")
        if self.entry and recorded != json.loads(json.dumps(self.entry.identity)):
            raise InputError(
                f"{self.directory} was run with another method or other options of the name {self.entry.name}.",
                "Rename the method, or choose another RUN.",
            )
        return True


def prepare(task: BenchTask) -> None:
    """Write the splits, make the teacher, and record its responses: to train on, and to measure the divergence on."""
    sizes = task.conditions.sizes
    for name, rows in task.splits().items():
        _write_rows(Path(f"{name}.jsonl"), rows)
        if name in SPLITS:
            _write_rows(Path(f"{name}-held-out.jsonl"), rows[: sizes.held_out])
    _write_rows(Path("probe.jsonl"), task.splits()["train"][: PROBE_STEPS * task.conditions.batch])
    task.make_teacher()
    for name in ("train", "probe", *(f"{split}-held-out" for split in SPLITS)):
        run_tsdkd(
            Path(),
            f"generate --policy teacher --teacher {task.teacher()} --prompts {name}.jsonl --rollouts teacher-{name} "
            f"{_sampling(task)}",
        )


def prepare_seed(settings: Settings, root: Path, seed: int) -> None:
    """Make the student of a seed, and what it is measured with."""
    with chdir(root):
        task, directory = find_task(settings), Path(f"seed-{seed}")
        started = time.perf_counter()
        task.make_student(seed, directory)
        if not (directory / "student-seconds").is_file():
            (directory / "student-seconds").write_text(f"{time.perf_counter() - started:.1f}\n")
        for split in SPLITS:
            run_tsdkd(
                directory,
                f"score --teacher {task.teacher()} --student {task.student(directory)} "
                f"--rollouts teacher-{split}-held-out --scores {directory}/{split}-held-out",
            )


def run_arm(settings: Settings, root: Path, arm: Arm) -> None:
    """Train and measure one arm, unless it is complete."""
    with chdir(root):
        if arm.is_complete:
            return
        task = find_task(settings)
        found: dict[str, object] = {}
        model = task.student(arm.directory.parent)
        if arm.entry:
            model = str(arm.directory / "checkpoint")
            _record(task, arm.entry, arm.seed, arm.directory, "train")
            _train(task, arm.entry, arm.rate, arm.seed, arm.directory, "train")
            found |= {"entry": arm.entry.identity}
            found |= training_costs(Path(model)) | training_health(Path(model))
        found |= measure(task, arm.directory, model, arm.split)
        write_result(arm.directory, found)


def probe(settings: Settings, root: Path, entry: Entry, seed: int) -> dict[str, float]:
    """The seconds of a step, with its recorded responses, and of a training beside its steps; measured once."""
    with chdir(root):
        file = Path("probe") / entry.name / RESULT
        if not file.is_file():
            task, started = find_task(settings), time.perf_counter()
            _record(task, entry, seed, file.parent, "probe")
            recorded = time.perf_counter()
            _train(task, entry, task.conditions.rate, seed, file.parent, "probe")
            seconds = time.perf_counter() - recorded
            steps = [times["whole"] for times in read_log(file.parent / "checkpoint" / TIMES_FILE)]
            step = median(steps) + (recorded - started) / PROBE_STEPS
            write_result(file.parent, {"step": step, "other": seconds - sum(steps)})
        return json.loads(file.read_text())


def training_costs(checkpoint: Path) -> dict[str, float]:
    """The median seconds of a step, the number of steps, and the response tokens that were learned from."""
    steps = [entry for entry in read_log(checkpoint / METRICS_FILE) if is_step(entry)]
    batch = load_manifest(checkpoint).config["batch_size"]
    return {
        "seconds_per_step": median(times["whole"] for times in read_log(checkpoint / TIMES_FILE)),
        "steps": len(steps),
        "tokens": round(sum(batch * entry["response_length"] for entry in steps)),
    }


def measure(task: BenchTask, output: Path, model: str, split: Split) -> dict[str, object]:
    """Greedy and sampled accuracy and the divergence from the teacher, and the seconds that it takes.

    A task with a benchmark has its accuracy on the test alone.
    """
    started = time.perf_counter()
    found: dict[str, object] = {}
    if not task.benchmark:
        found |= response_measures(_respond(task, output, model, split, "greedy", 0), task.is_correct)
        if split == "test":
            sampled = response_measures(_respond(task, output, model, split, "sampled", 1), task.is_correct)
            found["sampled_accuracy"] = sampled["accuracy"]
    elif split == "test":
        run_tsdkd(output, f"eval --tasks {task.benchmark} --model measured={model} --results {output}/results")
        found["accuracy"] = load_manifest(output / "results" / "measured").summary[task.benchmark]["value"]
    rollouts, scores = Path(f"teacher-{split}-held-out"), output.parent / f"{split}-held-out"
    found |= divergence(Path(model), rollouts, scores)
    return found | {"measuring_seconds": time.perf_counter() - started}


def _respond(task: BenchTask, output: Path, model: str, split: Split, name: str, temperature: float) -> Path:
    run_tsdkd(
        output,
        f"generate --student {model} --prompts {split}.jsonl --rollouts {output}/{name} --temperature {temperature} "
        f"{_sampling(task)}",
    )
    return output / name


def _record(task: BenchTask, entry: Entry, seed: int, output: Path, prompts: str) -> None:
    """Record the responses of a method that learns from those of both models; an arm has its own."""
    if entry.records_responses:
        run_tsdkd(
            output,
            f"generate --policy speculative --student {task.student(Path(f'seed-{seed}'))} --teacher {task.teacher()} "
            f"--prompts {prompts}.jsonl --rollouts {output}/rollouts --seed {seed} {_sampling(task)}",
        )


def _train(task: BenchTask, entry: Entry, rate: float, seed: int, output: Path, prompts: str) -> None:
    student, teacher = task.student(Path(f"seed-{seed}")), f"--teacher {task.teacher()}"
    conditions, method = task.conditions, entry.definition
    online = (
        f"{teacher} --engine transformers --max-new-tokens {conditions.response_tokens} "
        f"--sample-batch-size {conditions.batch}"
    )
    if method.uses_replay:
        data = f"--rollouts teacher-{prompts} {online} --held-out {conditions.scheduled} --eval-steps 20"
    elif method.online_responses:
        data = f"--prompts {prompts}.jsonl {online}"
    else:
        rollouts = f"{output}/rollouts" if entry.records_responses else f"teacher-{prompts}"
        data = f"--rollouts {rollouts}" + (
            f" {teacher} --engine transformers --lambda 0" if method.needs_teacher else ""
        )
    run_tsdkd(
        output,
        f"train {entry.train_options(conditions.k)} --student {student} {data} --checkpoint {output}/checkpoint "
        f"--learning-rate {rate:g} --seed {seed} --batch-size {conditions.batch} "
        f"--micro-batch-size {conditions.batch} --epochs {conditions.epochs}",
    )


def _sampling(task: BenchTask) -> str:
    conditions = task.conditions
    return f"--engine transformers --max-new-tokens {conditions.response_tokens} --batch-size {conditions.sample_batch}"


def _write_rows(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
