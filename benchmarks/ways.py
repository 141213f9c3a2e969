"""Eight short runs on one token budget: staged and live, full and LoRA, fixed and adaptive opener.

    python benchmarks/ways.py RUN STUDENT TEACHER [RESPONSES]

RUN is the run directory of a finished quickstart: its held-out responses are what every student is measured on.
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
"""Adapters want about ten times the rate."""


def main() -> None:
    run, student, teacher = Path(sys.argv[1]), *sys.argv[2:4]
    sampling = replace(SAMPLING, limit=int(sys.argv[4])) if len(sys.argv) > 4 else SAMPLING
    samples = OfflineSource(run / "held_out" / "rollouts", run / "held_out" / "scores")
    held_out = HeldOut(samples, range(len(samples)))

    def row(name: str, model: str, found: Artifact | None = None) -> list[str]:
        reader = load_model(model)
        measured = measure_held_out(reader, reader.head, held_out)
        numbers = [f"{measured['kl']:.4f} ± {measured['kl_stderr']:.4f}", f"{measured['agreement']:.3f}"]
        return [name, *numbers, str(found.manifest.summary["steps"] if found else 0)]

    table = Table("", "KL to the teacher", "top-1 agreement", "steps")
    table.add_row(*row("before", student))
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        generate(PROMPTS, student, place / "rollouts", sampling)
        score(place / "rollouts", student, teacher, place / "scores", ScoreConfig())
        for live, lora, opener in itertools.product((False, True), (False, True), (0.1, "adaptive")):
            name = ", ".join(["live" if live else "staged", "LoRA" if lora else "full", f"c {opener}"])
            config = TrainConfig(
                objective=replace(OBJECTIVE, opener=opener),
                online=OnlineConfig(sampling=sampling) if live else None,
                lora=LoRAConfig(merge=True) if lora else None,
                learning_rate=RATES[lora],
                epochs=1,
                batch_size=8,
            )
            if live:
                found = train_online(PROMPTS, student, teacher, place / name, config)
            else:
                found = train_offline(place / "rollouts", place / "scores", student, place / name, config)
            table.add_row(*row(name, str(found.path), found))
    Console().print(f"{len(samples)} held-out responses; {sampling.limit} responses learned from, once", table)


if __name__ == "__main__":
    main()
