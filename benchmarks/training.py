"""Time and memory of training steps, offline and online, and of TRL's DistillationTrainer on the same prompts.

    python benchmarks/training.py STUDENT TEACHER

TRL 1.16 must be importable for its row. Every row runs in its own process and makes `STEPS` optimizer steps of `BATCH`
responses of up to `TOKENS` tokens. Peak memory includes loading the models, and the time does not. "offline" and
"online, recorded responses" learn from the same responses: from scores, and with a loaded teacher.
"""

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tsdkd.cli.defaults import PROMPTS
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import OnlineConfig, TrainConfig
from tsdkd.stages.data.prompts import Prompts
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.metrics.log import METRICS_FILE
from tsdkd.stages.models.device import has_bfloat16
from tsdkd.stages.models.load import load_model
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.score.stage import score
from tsdkd.stages.train.stage import train_offline, train_online

STEPS, BATCH, TOKENS = 8, 8, 32
SAMPLING = GenerateConfig(engine="transformers", max_new_tokens=TOKENS, limit=STEPS * BATCH)
CONFIG = TrainConfig(epochs=1, batch_size=BATCH, micro_batch_size=BATCH, save_steps=10_000)
Measurement = tuple[float, float]
"""Seconds, and the response tokens that were trained on."""


class Clock(SilentObserver):
    """Times the progress bar of the training steps."""

    seconds = 0.0

    @contextmanager
    def progress(self, *_: Any) -> Iterator[Callable[[int], None]]:
        start = time.perf_counter()
        yield lambda _: None
        self.seconds = time.perf_counter() - start


def _measurement(checkpoint: Path, clock: Clock) -> Measurement:
    steps = [json.loads(line) for line in (checkpoint / METRICS_FILE).read_text().splitlines()]
    return clock.seconds, sum(BATCH * step["response_length"] for step in steps)


def offline(run: Path, student: str, teacher: str) -> Measurement:
    score(run / "rollouts", student, teacher, run / "scores", ScoreConfig())
    train_offline(run / "rollouts", run / "scores", student, run / "offline", CONFIG, 0, clock := Clock())
    return _measurement(run / "offline", clock)


def online_recorded(run: Path, student: str, teacher: str) -> Measurement:
    config = replace(CONFIG, online=OnlineConfig(student_fraction=0.0, sampling=SAMPLING))
    train_online(run / "rollouts", student, teacher, run / "recorded", config, 0, clock := Clock())
    return _measurement(run / "recorded", clock)


def online(run: Path, student: str, teacher: str) -> Measurement:
    config = replace(CONFIG, online=OnlineConfig(sampling=SAMPLING))
    train_online(PROMPTS, student, teacher, run / "online", config, 0, clock := Clock())
    return _measurement(run / "online", clock)


def trl_online(run: Path, student: str, teacher: str) -> Measurement:
    """Generalised JSD, on-policy; TRL has no other term."""
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    models = [load_model(name, "float32" if name == student else "auto") for name in (student, teacher)]
    prompts = [{"prompt": prompt.messages} for prompt in Prompts(PROMPTS, limit=STEPS * BATCH)]
    settings = DistillationConfig(
        output_dir=str(run / "trl"),
        learning_rate=CONFIG.learning_rate,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        max_completion_length=TOKENS,
        beta=0.9,
        bf16=has_bfloat16("cpu"),
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = DistillationTrainer(
        models[0].model, models[1].model, settings, Dataset.from_list(prompts), processing_class=models[0].tokenizer
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    lengths = [entry["completions/mean_length"] for entry in trainer.state.log_history if "loss" in entry]
    return seconds, sum(BATCH * length for length in lengths)


def _run(queue: Any, train: Callable[..., Measurement], *arguments: Any) -> None:
    seconds, tokens = train(*arguments)
    queue.put((seconds, tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9))


def main() -> None:
    student, teacher = sys.argv[1:3]
    runs = {"offline": offline, "online, recorded responses": online_recorded, "online": online}
    if find_spec("trl"):
        runs["TRL, online"] = trl_online
    table = Table("", "s per step", "response tokens", "tokens/s", "peak GB")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory)
        generate(PROMPTS, student, run / "rollouts", SAMPLING)
        for name, train in runs.items():
            queue = context.Queue()
            process = context.Process(target=_run, args=(queue, train, run, student, teacher))
            process.start()
            seconds, tokens, peak = queue.get()
            process.join()
            table.add_row(name, f"{seconds / STEPS:.2f}", f"{tokens:,.0f}", f"{tokens / seconds:.1f}", f"{peak:.2f}")
    Console().print(f"{STEPS} steps of {BATCH} responses, {torch.get_num_threads()} threads", table)


if __name__ == "__main__":
    main()
