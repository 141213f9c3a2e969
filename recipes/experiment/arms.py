"""The arms of an experiment: an entry with a learning rate and a seed, trained and measured."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from statistics import median
from typing import Literal

from recipes.experiment.commands import run_tsdkd
from recipes.experiment.conditions import ExperimentTask, Rows
from recipes.experiment.entries import Entry
from recipes.experiment.measures import RESULT, divergence, response_measures, training_health, write_result
from recipes.experiment.settings import SEARCH_SEED, Settings
from recipes.experiment.tasks import find_task
from recipes.experiment.workers import Workers
from tsdkd.artifacts.files import TIMES_FILE
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.errors import InputError, NotFiniteError
from tsdkd.stages.metrics.log import METRICS_FILE, is_step, read_log

Split = Literal["validation", "test"]
SPLITS: tuple[Split, ...] = ("validation", "test")
PROBE_STEPS = 3
STUDENT_SECONDS = "student-seconds"
"""The file that holds the seconds of making a seed's students."""


@dataclass(frozen=True)
class Arm:
    """A trained entry, or without an entry the student before training, and the split that measures it."""

    seed: int
    split: Split
    entry: Entry | None = None
    rate: float = 0.0
    start: int | None = None
    """The accuracy of the student before training, in percent; None: the task's."""

    @property
    def directory(self) -> Path:
        name = f"{self.entry.name}-{self.rate:g}" if self.entry else f"before-{self.split}"
        return Path(f"seed-{self.seed}") / (name + _from(self.start))

    @property
    def student(self) -> Path:
        return _student(self.seed, self.start)

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


def seed_directories(root: Path) -> list[Path]:
    """The directories of the seeds that are tested; the search's is not among them."""
    return [found for found in sorted(root.glob("seed-*/")) if found.name != f"seed-{SEARCH_SEED}"]


def _student(seed: int, start: int | None) -> Path:
    return Path(f"seed-{seed}") / f"student{_from(start)}"


def _from(start: int | None) -> str:
    return f"-from-{start}" if start is not None else ""


def prepare(task: ExperimentTask) -> None:
    """Write the splits, make the teacher, and record its responses for training and for the divergence."""
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
            f"generate --policy teacher --teacher {quote(task.teacher())} --prompts {name}.jsonl "
            f"--rollouts teacher-{name} {_sampling(task)}",
        )


def prepare_seed(settings: Settings, root: Path, seed: int, starts: Sequence[int | None] = (None,)) -> None:
    """Make the students of a seed, and the scores that measure their divergence."""
    with chdir(root):
        task, directory = find_task(settings), Path(f"seed-{seed}")
        directory.mkdir(exist_ok=True)
        started = time.perf_counter()
        task.make_students(seed, {start: _student(seed, start) for start in starts})
        if not (seconds := directory / STUDENT_SECONDS).is_file():
            seconds.write_text(f"{time.perf_counter() - started:.1f}\n")
        for split in SPLITS:
            run_tsdkd(
                directory,
                f"score --teacher {quote(task.teacher())} --student {quote(task.student(_student(seed, starts[0])))} "
                f"--rollouts teacher-{split}-held-out --scores {directory}/{split}-held-out",
            )


def run_arms(workers: Workers, title: str, settings: Settings, root: Path, chosen: Sequence[Arm]) -> None:
    """Run the arms that are not complete."""
    with chdir(root):
        missing = [arm for arm in chosen if not arm.is_complete]
    heading = f"{title}: {len(missing)} of {len(chosen)} arms to run"
    workers.each(heading, run_arm, [(settings, root, arm) for arm in missing])


def run_arm(settings: Settings, root: Path, arm: Arm) -> None:
    """Train and measure one arm, unless it is complete.

    An arm whose loss, gradient or logits are not finite counts as degenerated and has no measures.
    """
    with chdir(root):
        if arm.is_complete:
            return
        task = find_task(settings)
        found: dict[str, object] = {}
        model = task.student(arm.student)
        if arm.entry:
            model = str(arm.directory / "checkpoint")
            found |= {"entry": arm.entry.identity}
        try:
            if arm.entry:
                _train(task, arm, arm.directory, "train")
                found |= training_costs(Path(model)) | training_health(Path(model))
            found |= measure(task, arm.directory, model, arm.split)
        except NotFiniteError:
            if not arm.entry:
                raise
            found["degenerated"] = True
        write_result(arm.directory, found)


def result_row(task: str, arm: Arm, result: Mapping[str, object]) -> dict[str, object]:
    """An arm and its measures, as a row of `results.jsonl`."""
    return {
        "task": task,
        "method": arm.entry.name if arm.entry else "before",
        "rate": arm.rate,
        "start": arm.start,
        "seed": arm.seed,
        "split": arm.split,
        **result,
    }


def probe(settings: Settings, root: Path, entry: Entry, seed: int) -> dict[str, float]:
    """Measure the seconds of a step, with its recorded responses, and those of a training outside its steps.

    Times that exist are kept.
    """
    with chdir(root):
        output = Path("probe") / entry.name
        if not (output / RESULT).is_file():
            shutil.rmtree(output, ignore_errors=True)  # an interrupted training gives no times
            task = find_task(settings)
            started = time.perf_counter()
            recording = _train(task, Arm(seed, "validation", entry, task.conditions.rate), output, "probe")
            seconds = time.perf_counter() - started - recording
            steps = [times["whole"] for times in read_log(output / "checkpoint" / TIMES_FILE)]
            step = median(steps) + recording / PROBE_STEPS
            write_result(output, {"step": step, "other": seconds - sum(steps)})
        return json.loads((output / RESULT).read_text())


def training_costs(checkpoint: Path) -> dict[str, float]:
    """The median seconds of a step, the number of steps, and the number of response tokens in them."""
    steps = [entry for entry in read_log(checkpoint / METRICS_FILE) if is_step(entry)]
    batch = load_manifest(checkpoint).config["batch_size"]
    return {
        "seconds_per_step": median(times["whole"] for times in read_log(checkpoint / TIMES_FILE)),
        "steps": len(steps),
        "tokens": round(sum(batch * entry["response_length"] for entry in steps)),
    }


def measure(task: ExperimentTask, output: Path, model: str, split: Split) -> dict[str, object]:
    """Measure greedy and sampled accuracy, the divergence from the teacher, and the seconds of measuring.

    A benchmark measures accuracy on the test split alone.
    """
    started = time.perf_counter()
    found: dict[str, object] = {}
    benchmark, options = task.conditions.benchmark, task.conditions.eval_options
    if task.is_correct:
        found |= response_measures(respond(task, output, model, split, "greedy", "--temperature 0"), task.is_correct)
        limit = f"--limit {task.conditions.sizes.sampled}" if task.conditions.sizes.sampled else ""
        sampled = respond(task, output, model, split, "sampled", f"--temperature 1 {limit}")
        found["sampled_accuracy"] = response_measures(sampled, task.is_correct)["accuracy"]
    elif split == "test":
        run_tsdkd(
            output, f"eval --tasks {benchmark} {options} --model measured={quote(model)} --results {output}/results"
        )
        found["accuracy"] = load_manifest(output / "results" / "measured").summary[benchmark]["value"]
    rollouts, scores = Path(f"teacher-{split}-held-out"), output.parent / f"{split}-held-out"
    found |= divergence(Path(model), rollouts, scores)
    return found | {"measuring_seconds": time.perf_counter() - started}


def respond(task: ExperimentTask, output: Path, model: str, split: Split, name: str, options: str) -> Path:
    """Let a model respond to the prompts of a split, into `output/name`. options: further ones of `tsdkd generate`."""
    run_tsdkd(
        output,
        f"generate --student {quote(model)} --prompts {split}.jsonl --rollouts {output}/{name} "
        f"{options} {_sampling(task)}",
    )
    return output / name


def _train(task: ExperimentTask, arm: Arm, output: Path, prompts: str) -> float:
    """Train an arm's method on responses of its authors. Returns the seconds spent on recording them, or 0."""
    entry, conditions = arm.entry, task.conditions
    method = entry.definition
    student, teacher = quote(task.student(arm.student)), f"--teacher {quote(task.teacher())}"
    rollouts, started = f"teacher-{prompts}", time.perf_counter()
    if entry.records_responses:
        rollouts = f"{output}/rollouts"
        run_tsdkd(
            output,
            f"generate --policy speculative --student {student} {teacher} --prompts {prompts}.jsonl "
            f"--rollouts {rollouts} --seed {arm.seed} {_sampling(task)}",
        )
    recorded = time.perf_counter() - started
    engine = f"{teacher} --engine {conditions.engine}"
    online = f"{engine} --max-new-tokens {conditions.response_tokens} --sample-batch-size {conditions.batch}"
    if method.uses_replay:
        data = f"--rollouts {rollouts} {online} --held-out {conditions.scheduled} --eval-steps 20"
    elif entry.author == "half":
        data = f"--rollouts {rollouts} {online} --lambda 0.5"
    elif entry.author == "the method's" and method.online_responses and "student" in method.authors:
        data = f"--prompts {prompts}.jsonl {online}"
    else:
        data = f"--rollouts {rollouts}" + (f" {engine} --lambda 0" if method.needs_teacher else "")
    run_tsdkd(
        output,
        f"train {entry.train_options(conditions.k)} --student {student} {data} --checkpoint {output}/checkpoint "
        f"--learning-rate {arm.rate:g} --seed {arm.seed} --batch-size {conditions.batch} "
        f"--micro-batch-size {conditions.batch} --epochs 1",
    )
    return recorded


def _sampling(task: ExperimentTask) -> str:
    conditions = task.conditions
    words = f"--engine {conditions.engine} --max-new-tokens {conditions.response_tokens}"
    return f"{words} --batch-size {conditions.sample_batch}"


def _write_rows(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
