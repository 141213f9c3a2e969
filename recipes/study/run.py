"""Runs the study: python -m recipes.study.run PLACE [--seeds 0,1,2] [--scale tiny]

Every arm is a `tsdkd train` and a greedy `tsdkd generate`, called in this process: a new one would load torch for
longer than an arm takes. What is finished is skipped, so a run that was stopped continues by the same line.
"""

import argparse
import contextlib
import json
import sys
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from recipes.study import measures, models, task
from recipes.study.arms import MAIN, Arm, every_arm
from tsdkd.cli import app

INTERRUPTED = 130


@dataclass(frozen=True)
class Scale:
    """How much of everything; `full` is the study, `tiny` shows that it runs."""

    teacher: models.Shape = models.TEACHER
    student: models.Shape = models.STUDENT
    teacher_accuracy: int = 99
    prompts: int = 3200
    """Learned from once, 32 a step."""
    test: int = 1000
    dev: int = 200
    held_out: int = 200


SCALES = {
    "full": Scale(),
    "tiny": Scale(
        replace(models.TEACHER, steps=models.EVERY), replace(models.STUDENT, steps=models.EVERY), 0, 64, 32, 16, 16
    ),
}


@dataclass(frozen=True)
class Study:
    """Lies in the working directory."""

    scale: Scale
    arms: list[Arm]
    progress: Progress

    def prepare(self) -> None:
        """Problems, the teacher, its answers to learn from and those that closeness is measured on."""
        task.write(Path("test.jsonl"), self.test)
        task.write(Path("held_out.jsonl"), self.test[: self.scale.held_out])
        task.write(Path("train.jsonl"), self._problems[-self.scale.prompts :])
        self._make("teacher", self.scale.teacher, 7, {self.scale.teacher_accuracy: Path("teacher")}, decay=True)
        for name in ("train", "held_out"):
            self._tsdkd(
                Path(),
                f"generate --policy teacher --teacher teacher --prompts {name}.jsonl "
                f"--rollouts {name} --max-new-tokens {task.ANSWER_TOKENS} "
                "--engine transformers --batch-size 250",
            )

    def seed(self, seed: int) -> None:
        """Students of this seed's own, and all arms."""
        place = Path(f"seed-{seed}")
        starts = {arm.start: place / f"student-{arm.start}" for arm in self.arms}
        self._make(f"students of seed {seed}", self.scale.student, seed, starts, decay=False)
        for name in ("train", "held_out"):
            self._tsdkd(
                place,
                f"score --teacher teacher --student {starts[self.arms[0].start]} --k 5 "
                f"--rollouts {name} --scores {place}/{name}",
            )
        bar = self.progress.add_task(f"arms of seed {seed}", total=len(starts) + len(self.arms))
        for start, student in starts.items():
            self._measure(place / f"before-{start}", student)
            self.progress.advance(bar)
        for arm in self.arms:
            self._learn(arm, seed, place, starts[arm.start])
            right = json.loads((place / arm.slug / measures.RESULT).read_text())["accuracy"]
            self.progress.console.print(f"seed {seed}: {arm.name}: {right:.1%}", soft_wrap=True)
            self.progress.advance(bar)

    @property
    def test(self) -> list[str]:
        return self._problems[: self.scale.test]

    @property
    def _problems(self) -> list[str]:
        return list(islice(task.problems(0), self.scale.test + self.scale.dev + self.scale.prompts))

    def _make(self, label: str, shape: models.Shape, seed: int, places: dict[int, Path], *, decay: bool) -> None:
        if all(place.is_dir() for place in places.values()):
            return
        bar = self.progress.add_task(f"{label} learn from solutions", total=shape.steps)
        dev = self._problems[self.scale.test :][: self.scale.dev]
        models.make(shape, seed, places, dev, lambda steps: self.progress.advance(bar, steps), decay=decay)
        self.progress.update(bar, completed=shape.steps)

    def _learn(self, arm: Arm, seed: int, place: Path, student: Path) -> None:
        output = place / arm.slug
        if (output / measures.RESULT).is_file():
            return
        recorded = "--rollouts train"
        live = f"--teacher teacher --engine transformers --max-new-tokens {task.ANSWER_TOKENS} --sample-batch-size 32"
        data = {
            "student": f"--prompts train.jsonl {live}",
            "half": f"{recorded} {live} --lambda 0.5",
            "replayed": f"{recorded} {live}",
            "teacher": recorded if "seqkd" in arm.options else f"{recorded} --scores {place}/train",
        }
        self._tsdkd(
            output,
            f"train {arm.options} --student {student} {data[arm.data]} --checkpoint {output}/checkpoint "
            f"--learning-rate {arm.rate} --seed {seed} --batch-size 32 --micro-batch-size 32 --epochs 1",
        )
        self._measure(output, output / "checkpoint")

    def _measure(self, output: Path, model: Path) -> None:
        """Answer the test greedily, and write what came out."""
        if (output / measures.RESULT).is_file():
            return
        self._tsdkd(
            output,
            f"generate --student {model} --prompts test.jsonl --rollouts {output}/answers "
            f"--temperature 0 --max-new-tokens {task.ANSWER_TOKENS} --engine transformers --batch-size 250",
        )
        measures.write(output, model, Path("held_out"), output.parent / "held_out")

    def _tsdkd(self, place: Path, command: str) -> None:
        """Run one command; what it prints goes to a file. Ends the process where the command fails."""
        place.mkdir(parents=True, exist_ok=True)
        sys.argv = ["tsdkd", *command.split()]  # a journal records what was typed
        with (
            (place / "log.txt").open("a") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            status = app(sys.argv[1:], prog_name="tsdkd", standalone_mode=False)
        if status:
            why = (
                "stopped: the same line continues"
                if status == INTERRUPTED
                else f"failed, see {(place / 'log.txt').resolve()}"
            )
            self.progress.console.print(f"tsdkd {command}: {why}", soft_wrap=True)
            raise SystemExit(status)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("place", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--scale", choices=SCALES, default="full")
    told = parser.parse_args()
    arms = every_arm() if told.scale == "full" else [replace(MAIN[-1], start=0)]
    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    console = Console(file=sys.stdout)  # this one's: what commands say goes to their logs
    told.place.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(told.place), Progress(*columns, console=console) as progress:
        study = Study(SCALES[told.scale], arms, progress)
        try:
            study.prepare()
            for seed in map(int, told.seeds.split(",")):
                study.seed(seed)
        except KeyboardInterrupt:
            console.print("stopped: the same line continues")
            raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
