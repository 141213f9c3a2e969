"""Power cuts: a file of a saved step or of an artifact is cut short or has a flipped bit; is it noticed, and mended?

    python -m benchmarks.robustness.power_cuts --trials 120

Every file of two saved steps (full weights, LoRA, held-out measurements) and of rollouts, scores and a checkpoint is
damaged in turn, at positions that the seed chooses. After damage to a saved step, `train` runs again, in a forked
process. After damage to an artifact, `artifact verify` reads it, and its stage runs again with --overwrite. A trial is
a fault if the bytes then differ from those of an uninterrupted run, or if the second run fails. A damaged step that is
older than an intact one is not read, so it is not noticed.
"""

import json
import os
import random
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from benchmarks.robustness.rows import Row, campaign_parser, write_rows_and_exit
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tests.helpers.training import CONFIG, RecordingObserver
from tsdkd.artifacts.files import CONFIG_FILE, JOURNAL_FILE, LOCK_FILE, TIMES_FILE
from tsdkd.artifacts.reader import verify_artifact
from tsdkd.errors import ArtifactError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import LoRAConfig, TrainConfig
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.score.stage import score
from tsdkd.stages.train.stage import train_offline
from tsdkd.stages.train.trainer import DistillationTrainer

TRAININGS = {
    "full": CONFIG,
    "lora": replace(CONFIG, lora=LoRAConfig(rank=2)),
    "held out": replace(CONFIG, held_out=0.3, eval_steps=2),
}
OUTCOMES = ("noticed", "unnoticed, equal bytes", "silent difference", "retry fails")
FAULTS = OUTCOMES[2:]
NO_CONTENT = {LOCK_FILE, JOURNAL_FILE, TIMES_FILE, CONFIG_FILE}
"""Files that hold no content of an artifact."""


class Workspace:
    """Tiny models, a complete run, and for each training a checkpoint that was cut after two saved steps."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.teacher = save_tiny_model(path / "teacher", seed=1, layers=3, width=48)
        self.student = save_tiny_model(path / "student", seed=2)
        self.prompts = write_prompts(path / "prompts.jsonl", 12)
        for kind in ("rollouts", "scores"):
            self.make(kind, path / kind)
        for name in TRAININGS:
            self.make(name, path / name / "whole")
            self._cut(name)

    def make(self, kind: str, output: Path, *, overwrite: bool = False) -> list[str]:
        """Run the stage, or the training, that writes an artifact. Returns its warnings."""
        observer, student, teacher = RecordingObserver(), str(self.student), str(self.teacher)
        if kind == "rollouts":
            config = GenerateConfig(engine="transformers", max_new_tokens=12, part_size=4)
            generate(self.prompts, student, output, config, 0, observer, overwrite)
        elif kind == "scores":
            score(self.path / "rollouts", student, teacher, output, ScoreConfig(k=4), observer, overwrite)
        else:
            self._train(TRAININGS[kind], output, observer, overwrite)
        return observer.warnings

    def _train(self, config: TrainConfig, output: Path, observer: RecordingObserver, overwrite: bool) -> None:
        inputs = self.path / "rollouts", self.path / "scores", str(self.student)
        train_offline(*inputs, output, config, 0, observer, overwrite)

    def _cut(self, name: str) -> None:
        compute_loss = DistillationTrainer.compute_loss

        def cut_or_compute(trainer: DistillationTrainer, *arguments: object, **more: object) -> object:
            if trainer.state.global_step == 5:
                raise InterruptedError
            return compute_loss(trainer, *arguments, **more)

        with patch.object(DistillationTrainer, "compute_loss", cut_or_compute):
            try:
                self.make(name, self.path / name / "cut")
            except InterruptedError:
                return
        raise AssertionError(name)


def contents(path: Path) -> dict[str, bytes]:
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name not in NO_CONTENT]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def cut_short(content: bytes, generator: random.Random) -> bytes:
    return content[: generator.choice((0, len(content) - 1, generator.randrange(len(content))))]


def flip_bit(content: bytes, generator: random.Random) -> bytes:
    damaged = bytearray(content)
    damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    return bytes(damaged)


DAMAGES = {"cut short": cut_short, "flipped bit": flip_bit}


def train_again(workspace: Workspace, name: str, output: Path) -> str:
    """The outcome of the same command after damage to a saved step."""
    warnings = workspace.make(name, output)
    if contents(output) != contents(workspace.path / name / "whole"):
        return "silent difference"
    return "noticed" if any("saved steps were deleted" in text for text in warnings) else "unnoticed, equal bytes"


def verify_and_make_again(workspace: Workspace, kind: str, output: Path, whole: Path) -> str:
    """The outcome of `artifact verify` after damage to an artifact, and of its stage with --overwrite."""
    try:
        verify_artifact(output)
    except ArtifactError as error:
        if "remove the directory" in error.remedy:
            shutil.rmtree(output)
        workspace.make(kind, output, overwrite=output.exists())
        return "noticed" if contents(output) == contents(whole) else "silent difference"
    return "unnoticed, equal bytes" if json_or_bytes(output) == json_or_bytes(whole) else "silent difference"


def json_or_bytes(path: Path) -> dict[str, object]:
    """Contents, the manifest as values: a changed space changes nothing."""
    return {name: json.loads(data) if name == "manifest.json" else data for name, data in contents(path).items()}


def in_fork(function: Callable[[], str]) -> str:
    """The outcome of a function in a forked process; "retry fails" for an exception and for a crash."""
    if (child := os.fork()) == 0:
        status = len(OUTCOMES)
        try:
            status = OUTCOMES.index(function())
        except BaseException:  # an exit or an interrupt too is a failed retry; the child ends here
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return OUTCOMES[status] if 0 <= status < len(OUTCOMES) else "retry fails"


def trial(workspace: Workspace, kind: str, file: Path, damage: str, generator: random.Random) -> str:
    """Damage a copy of a file's artifact, and return the outcome."""
    is_step = kind in TRAININGS
    source = (
        workspace.path / kind / "cut" if is_step else workspace.path / ("full/whole" if kind == "checkpoint" else kind)
    )
    output = source.with_name("trial")
    shutil.copytree(source, output)
    target = output / file.relative_to(source)
    target.write_bytes(DAMAGES[damage](file.read_bytes(), generator))
    try:
        if is_step:
            return in_fork(lambda: train_again(workspace, kind, output))
        stage = "full" if kind == "checkpoint" else kind
        return in_fork(lambda: verify_and_make_again(workspace, stage, output, source))
    finally:
        shutil.rmtree(output)


def campaign(workspace: Workspace, trials: int, seed: int) -> dict[tuple[str, str], Counter[str]]:
    """Counts of outcomes by kind and damage. Every file is damaged before one is damaged again."""
    generator = random.Random(seed)
    cases = [
        (kind, file)
        for kind in TRAININGS
        for file in (workspace.path / kind / "cut" / "resume").rglob("checkpoint-*/*")
    ]
    for kind, path in (("rollouts", "rollouts"), ("scores", "scores"), ("checkpoint", "full/whole")):
        cases += [(kind, file) for file in (workspace.path / path).rglob("*") if file.name not in NO_CONTENT]
    cases = [(kind, file, damage) for kind, file in sorted(cases) if file.is_file() for damage in DAMAGES]
    generator.shuffle(cases)
    counts: dict[tuple[str, str], Counter[str]] = {}
    for i in range(trials):
        kind, file, damage = cases[i % len(cases)]
        outcome = trial(workspace, kind, file, damage, generator)
        if outcome in FAULTS:
            print(f"{outcome}: {kind}, {file.relative_to(workspace.path)}, {damage}", file=sys.stderr)
        counts.setdefault((kind, damage), Counter())[outcome] += 1
    return counts


def main() -> None:
    options = campaign_parser(__doc__, trials=300).parse_args()
    with TemporaryDirectory() as directory:
        counts = campaign(Workspace(Path(directory)), options.trials, options.seed)
    rows = [
        Row(
            f"{'saved step' if kind in TRAININGS else 'artifact'}, {kind}, {damage}",
            found.total(),
            sum(found[name] for name in FAULTS),
            {name: found[name] for name in OUTCOMES},
        )
        for (kind, damage), found in sorted(counts.items())
    ]
    write_rows_and_exit("Power cuts", rows, options.json)


if __name__ == "__main__":
    main()
