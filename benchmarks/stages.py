"""Each stage's rate and peak memory beside a bare transformers loop over the same tokens, in the same run.

    python benchmarks/stages.py RUN STUDENT TEACHER

RUN is the run directory of a finished quickstart. Every row is a process of its own, so that peaks do not mix; loading
the models is part of the peak and not of the time.
"""

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig

from tsdkd.artifacts import load_manifest, read
from tsdkd.core import TSDKDConfig
from tsdkd.stages.batches import by_length, join, pad_left
from tsdkd.stages.config import GenerateConfig, ScoreConfig, TrainConfig
from tsdkd.stages.generate import generate
from tsdkd.stages.models import load_model
from tsdkd.stages.score import score
from tsdkd.stages.train import train


class Clock:
    """A reporter that times the stage's own progress bar: work without loading."""

    seconds = 0.0

    @contextmanager
    def progress(self, *_: Any) -> Iterator[Callable[[int], None]]:
        start = time.perf_counter()
        yield lambda _: None
        self.seconds = time.perf_counter() - start

    def say(self, message: str) -> None: ...

    def table(self, title: str, rows: list[tuple[str, str]]) -> None: ...


def stage_generate(run: Path, student: str, teacher: str) -> float:
    config = _config(GenerateConfig, run / "rollouts")
    clock = Clock()
    prompts = (run / "rollouts" / load_manifest(run / "rollouts").parents[0].path).resolve()
    with tempfile.TemporaryDirectory() as place:
        generate(prompts, student, Path(place) / "r", config, reporter=clock)
    return clock.seconds


def bare_generate(run: Path, student: str, teacher: str) -> float:
    """model.generate on the same prompts, length-sorted, without storing anything."""
    config = _config(GenerateConfig, run / "rollouts")
    reader = load_model(student)
    prompts = read(run / "rollouts", "rollouts").table()["prompt_ids"].to_pylist()
    settings = GenerationConfig(
        do_sample=True, top_k=0, temperature=config.temperature, max_new_tokens=config.max_new_tokens
    )
    start = time.perf_counter()
    for batch in by_length([len(p) for p in prompts], size=config.batch_size):
        ids, mask = pad_left([prompts[i] for i in batch])
        with torch.inference_mode():
            reader.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    return time.perf_counter() - start


def stage_score(run: Path, student: str, teacher: str) -> float:
    clock = Clock()
    with tempfile.TemporaryDirectory() as place:
        score(run / "rollouts", student, teacher, Path(place) / "s", _config(ScoreConfig, run / "scores"), clock)
    return clock.seconds


def bare_forward(run: Path, student: str, teacher: str) -> float:
    """Both models' own forward over the same batches: logits of every position, and nothing done with them."""
    readers = load_model(student), load_model(teacher)
    rows = read(run / "rollouts", "rollouts").table().select(["prompt_ids", "response_ids"]).to_pylist()
    start = time.perf_counter()
    for batch in by_length(
        [len(r["prompt_ids"]) + len(r["response_ids"]) for r in rows], tokens=ScoreConfig.batch_tokens
    ):
        ids, mask, _ = join([rows[i]["prompt_ids"] for i in batch], [rows[i]["response_ids"] for i in batch])
        with torch.inference_mode():
            for reader in readers:
                reader.model(input_ids=ids, attention_mask=mask, use_cache=False)
    return time.perf_counter() - start


def stage_train(run: Path, student: str, teacher: str) -> float:
    found = dict(load_manifest(run / "checkpoint").config)
    objective = TSDKDConfig(**found.pop("objective"))
    clock = Clock()
    with tempfile.TemporaryDirectory() as place:
        config = TrainConfig(objective=objective, **found | {"epochs": 1})
        train(run / "rollouts", run / "scores", student, Path(place) / "c", config, reporter=clock)
    return clock.seconds


def bare_train(run: Path, student: str, teacher: str) -> float:
    """A plain AdamW loop with the cross-entropy of the same responses: no teacher, no selection."""
    config = load_manifest(run / "checkpoint").config
    model = load_model(student, "float32").model.train()
    rows = read(run / "rollouts", "rollouts").table().select(["prompt_ids", "response_ids"]).to_pylist()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    start = time.perf_counter()
    for at in range(0, len(rows), config["batch_size"]):
        batch = rows[at : at + config["batch_size"]]
        ids, mask, predicting = join([r["prompt_ids"] for r in batch], [r["response_ids"] for r in batch])
        labels = torch.where(predicting.roll(1, 1), ids, -100)
        with torch.autocast("cpu", torch.bfloat16, enabled=config["precision"] == "bf16"):
            model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


def _config(kind: type, artifact: Path) -> Any:
    found = load_manifest(artifact).config
    return kind(**{field.name: found[field.name] for field in fields(kind)})


def _measured(queue: Any, work: Callable[..., float], *arguments: Any) -> None:
    seconds = work(*arguments)
    queue.put((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6))


def main() -> None:
    run, student, teacher = Path(sys.argv[1]), *sys.argv[2:4]
    rows = read(run / "rollouts", "rollouts").table().select(["prompt_ids", "response_ids"]).to_pylist()
    responses = sum(len(row["response_ids"]) for row in rows)
    everything = responses + sum(len(row["prompt_ids"]) for row in rows)
    pairs = [
        ("generate", stage_generate, bare_generate, responses),
        ("score", stage_score, bare_forward, everything),
        ("train, one epoch", stage_train, bare_train, everything),
    ]
    table = Table("", "tokens/s", "bare tokens/s", "ratio", "peak GB", "bare peak GB")
    context = multiprocessing.get_context("spawn")
    for name, stage, bare, tokens in pairs:
        found = []
        for work in (stage, bare):
            queue = context.Queue()
            process = context.Process(target=_measured, args=(queue, work, run, student, teacher))
            process.start()
            found.append(queue.get())
            process.join()
        (seconds, peak), (bare_seconds, bare_peak) = found
        rates = tokens / seconds, tokens / bare_seconds
        table.add_row(
            name,
            f"{rates[0]:,.0f}",
            f"{rates[1]:,.0f}",
            f"{rates[0] / rates[1]:.2f}",
            f"{peak:.2f}",
            f"{bare_peak:.2f}",
        )
    Console().print(json.dumps({"responses": len(rows), "response tokens": responses, "all tokens": everything}), table)


if __name__ == "__main__":
    main()
