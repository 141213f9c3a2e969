"""Runs the study: python -m recipes.study.run DIRECTORY [--seeds 0,1,2] [--scale tiny]

Every arm is a `tsdkd train` and a greedy `tsdkd generate`, called in this process: a new process would load torch for
longer than an arm takes. Complete arms are skipped, so the same command resumes an interrupted study.
"""

import argparse
import contextlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from recipes.experiment import measures, models
from recipes.experiment.commands import INTERRUPTED, run_tsdkd
from recipes.experiment.sums import SUMS
from recipes.experiment.task import Shape, write_prompts
from recipes.study.arms import MAIN, Arm, every_arm


@dataclass(frozen=True)
class Scale:
    """Sizes of models and data; `full` is the study, `tiny` shows that it runs."""

    teacher: Shape = SUMS.teacher
    student: Shape = SUMS.student
    teacher_accuracy: int = 99
    prompts: int = 3200
    """One epoch, 32 per step."""
    test: int = 1000
    dev: int = 200
    held_out: int = 200


SCALES = {
    "full": Scale(),
    "tiny": Scale(
        replace(SUMS.teacher, steps=SUMS.teacher.every),
        replace(SUMS.student, steps=SUMS.student.every),
        *(0, 64, 32, 16, 16),
    ),
}


@dataclass(frozen=True)
class Study:
    """One study, in the working directory."""

    scale: Scale
    arms: list[Arm]
    progress: Progress

    def prepare(self) -> None:
        """Make the problems, the teacher, and its responses for training and for held-out measurement."""
        test, _, train = self._problems
        write_prompts(Path("test.jsonl"), test)
        write_prompts(Path("held_out.jsonl"), test[: self.scale.held_out])
        write_prompts(Path("train.jsonl"), train)
        self._train_on_solutions(
            "teacher", self.scale.teacher, 7, {self.scale.teacher_accuracy: Path("teacher")}, decay=True
        )
        for name in ("train", "held_out"):
            run_tsdkd(
                Path(),
                f"generate --policy teacher --teacher teacher --prompts {name}.jsonl "
                f"--rollouts {name} --max-new-tokens {SUMS.response_tokens} "
                "--engine transformers --batch-size 250",
            )

    def run_seed(self, seed: int) -> None:
        """Make the students of one seed, and run all arms."""
        directory = Path(f"seed-{seed}")
        starts = {arm.start: directory / f"student-{arm.start}" for arm in self.arms}
        self._train_on_solutions(f"students of seed {seed}", self.scale.student, seed, starts, decay=False)
        for name in ("train", "held_out"):
            run_tsdkd(
                directory,
                f"score --teacher teacher --student {starts[self.arms[0].start]} --k 5 "
                f"--rollouts {name} --scores {directory}/{name}",
            )
        bar = self.progress.add_task(f"arms of seed {seed}", total=len(starts) + len(self.arms))
        for start, student in starts.items():
            self._measure(directory / f"before-{start}", student)
            self.progress.advance(bar)
        for arm in self.arms:
            self._train(arm, seed, directory, starts[arm.start])
            accuracy = json.loads((directory / arm.slug / measures.RESULT).read_text())["accuracy"]
            self.progress.console.print(f"seed {seed}: {arm.name}: {accuracy:.1%}", soft_wrap=True)
            self.progress.advance(bar)

    @property
    def _problems(self) -> list[list[str]]:
        return SUMS.split(self.scale.test, self.scale.dev, self.scale.prompts)

    def _train_on_solutions(
        self, label: str, shape: Shape, seed: int, directories: dict[int, Path], *, decay: bool
    ) -> None:
        if all(directory.is_dir() for directory in directories.values()):
            return
        bar = self.progress.add_task(f"{label} are trained on solutions", total=shape.steps)
        dev = self._problems[1]
        models.make(SUMS, shape, seed, directories, dev, lambda steps: self.progress.advance(bar, steps), decay=decay)
        self.progress.update(bar, completed=shape.steps)

    def _train(self, arm: Arm, seed: int, directory: Path, student: Path) -> None:
        output = directory / arm.slug
        if (output / measures.RESULT).is_file():
            return
        recorded = "--rollouts train"
        online = (
            f"--teacher teacher --engine transformers --max-new-tokens {SUMS.response_tokens} --sample-batch-size 32"
        )
        data = {
            "student": f"--prompts train.jsonl {online}",
            "half": f"{recorded} {online} --lambda 0.5",
            "replayed": f"{recorded} {online}",
            "teacher": recorded if "seqkd" in arm.options else f"{recorded} --scores {directory}/train",
        }
        run_tsdkd(
            output,
            f"train {arm.options} --student {student} {data[arm.data]} --checkpoint {output}/checkpoint "
            f"--learning-rate {arm.rate} --seed {seed} --batch-size 32 --micro-batch-size 32 --epochs 1",
        )
        self._measure(output, output / "checkpoint")

    def _measure(self, output: Path, model: Path) -> None:
        """Sample greedy responses to the test problems and write the measures."""
        if (output / measures.RESULT).is_file():
            return
        run_tsdkd(
            output,
            f"generate --student {model} --prompts test.jsonl --rollouts {output}/responses "
            f"--temperature 0 --max-new-tokens {SUMS.response_tokens} --engine transformers --batch-size 250",
        )
        found = measures.response_measures(output / "responses", SUMS.is_correct)
        found |= measures.divergence(model, Path("held_out"), output.parent / "held_out")
        measures.write_result(output, found | measures.training_health(model))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--scale", choices=SCALES, default="full")
    options = parser.parse_args()
    arms = every_arm() if options.scale == "full" else [replace(MAIN[-1], start=0)]
    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    console = Console(file=sys.stdout)  # the output of commands goes to their logs
    options.directory.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(options.directory), Progress(*columns, console=console) as progress:
        study = Study(SCALES[options.scale], arms, progress)
        try:
            study.prepare()
            for seed in map(int, options.seeds.split(",")):
                study.run_seed(seed)
        except KeyboardInterrupt:
            console.print("interrupted: run the same command again to continue")
            raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
