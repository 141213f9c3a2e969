"""Eight short runs on one token budget: offline and online, full and LoRA, fixed and adaptive opener.

    python benchmarks/training_modes.py RUN STUDENT TEACHER [RESPONSES]

RUN is the run directory of a complete quickstart, on whose held-out responses every student is measured.
"""

import itertools
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tsdkd.artifacts.reader import Artifact
from tsdkd.cli.defaults import PROMPTS
from tsdkd.core import TSDKDConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import LoRAConfig, OnlineConfig, TrainConfig
from tsdkd.stages.data.held_out import HeldOut, measure_held_out
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.load import load_model
from tsdkd.stages.score.stage import score
from tsdkd.stages.train.stage import train_offline, train_online

SAMPLING = GenerateConfig(engine="transformers", temperature=0.5, max_new_tokens=32, batch_size=64, limit=128)
OBJECTIVE = TSDKDConfig(direct_weight=10, em_weight=0.01)
RATES = {False: 3e-5, True: 3e-4}
"""By LoRA: adapters need about ten times the learning rate."""


def main() -> None:
    run, student, teacher = Path(sys.argv[1]), *sys.argv[2:4]
    sampling = replace(SAMPLING, limit=int(sys.argv[4])) if len(sys.argv) > 4 else SAMPLING
    samples = OfflineSource(run / "held-out" / "rollouts", run / "held-out" / "scores")
    held_out = HeldOut(samples, range(len(samples)))

    def row(name: str, model: str, checkpoint: Artifact | None = None) -> list[str]:
        reader = load_model(model)
        measured = measure_held_out(reader, reader.head, held_out)
        numbers = [f"{measured['kl']:.4f} ± {measured['kl_stderr']:.4f}", f"{measured['top1_agreement']:.3f}"]
        return [name, *numbers, str(checkpoint.manifest.summary["steps"] if checkpoint else 0)]

    table = Table("", "KL to the teacher", "top-1 agreement", "steps")
    table.add_row(*row("before", student))
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        generate(PROMPTS, student, work / "rollouts", sampling)
        score(work / "rollouts", student, teacher, work / "scores", ScoreConfig())
        for online, lora, opener in itertools.product((False, True), (False, True), (0.1, "adaptive")):
            name = ", ".join(["online" if online else "offline", "LoRA" if lora else "full", f"c {opener}"])
            config = TrainConfig(
                objective=replace(OBJECTIVE, opener=opener),
                online=OnlineConfig(sampling=sampling) if online else None,
                lora=LoRAConfig(merge=True) if lora else None,
                learning_rate=RATES[lora],
                epochs=1,
                batch_size=8,
            )
            if online:
                checkpoint = train_online(PROMPTS, student, teacher, work / name, config)
            else:
                checkpoint = train_offline(work / "rollouts", work / "scores", student, work / name, config)
            table.add_row(*row(name, str(checkpoint.path), checkpoint))
    Console().print(f"{len(samples)} held-out responses; {sampling.limit} responses trained on, once", table)


if __name__ == "__main__":
    main()
