"""Each stage's rate and peak memory beside a bare transformers loop over the same sequences, in the same run.

    python benchmarks/stages.py RUN STUDENT TEACHER [ROW]

RUN is the run directory of a finished quickstart; ROW is how the names of the wanted rows begin. Every row is a process
of its own, so that peaks do not mix; loading the models is part of the peak and not of the time. Sampling is random, so
each row counts the tokens it made itself.
"""

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

from tsdkd.artifacts.manifest import load_manifest
from tsdkd.artifacts.reader import read_artifact
from tsdkd.core import TSDKDConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import TrainConfig
from tsdkd.stages.data.batches import batches_by_length, join_right_padded, pad_left
from tsdkd.stages.data.score_cost import MAX_PADDING
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.load import load_model
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.score.stage import score
from tsdkd.stages.train.stage import train_offline

Measure = tuple[float, int]
"""Seconds, and tokens read or sampled in them."""


class Clock(SilentObserver):
    """Times the stage's own progress bar: work without loading."""

    seconds = 0.0

    @contextmanager
    def progress(self, *_: Any) -> Iterator[Callable[[int], None]]:
        start = time.perf_counter()
        yield lambda _: None
        self.seconds = time.perf_counter() - start


def stage_generate(run: Path, student: str, teacher: str) -> Measure:
    config = _config(GenerateConfig, run / "rollouts")
    clock = Clock()
    prompts = (run / "rollouts" / load_manifest(run / "rollouts").parents[0].path).resolve()
    with tempfile.TemporaryDirectory() as place:
        made = generate(prompts, student, Path(place) / "r", config, load_manifest(run / "rollouts").seed, clock)
        return clock.seconds, made.manifest.summary["response_tokens"]


def bare_generate(run: Path, student: str, teacher: str) -> Measure:
    """model.generate on the same prompts, length-sorted, without storing anything."""
    config = _config(GenerateConfig, run / "rollouts")
    reader = load_model(student)
    prompts = read_artifact(run / "rollouts", "rollouts").table()["prompt_ids"].to_pylist()
    settings = GenerationConfig(
        do_sample=True, top_k=0, temperature=config.temperature, max_new_tokens=config.max_new_tokens
    )
    tokens, start = 0, time.perf_counter()
    for batch in batches_by_length([len(p) for p in prompts], size=config.batch_size):
        ids, mask = pad_left([prompts[i] for i in batch])
        with torch.inference_mode():
            made = reader.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        ended = (made[:, ids.shape[1] :] == reader.end_ids[0]).long().cumsum(-1)
        tokens += int((ended == 0).sum() + (ended.max(-1).values > 0).sum())
    return time.perf_counter() - start, tokens


def stage_score(run: Path, student: str, teacher: str) -> Measure:
    clock = Clock()
    with tempfile.TemporaryDirectory() as place:
        score(run / "rollouts", student, teacher, Path(place) / "s", _config(ScoreConfig, run / "scores"), clock)
    return clock.seconds, _tokens(run)


def bare_forward(run: Path, student: str, teacher: str) -> Measure:
    """Both models' own forward, length-sorted, as little padding: logits of all positions, nothing done with them."""
    config = _config(ScoreConfig, run / "scores")
    readers = load_model(student, config.dtype), load_model(teacher, config.dtype)
    rows = read_artifact(run / "rollouts", "rollouts").table().select(["prompt_ids", "response_ids"]).to_pylist()
    start = time.perf_counter()
    lengths = [len(r["prompt_ids"]) + len(r["response_ids"]) for r in rows]
    for batch in batches_by_length(lengths, tokens=config.batch_tokens, padding=MAX_PADDING):
        ids, mask, _ = join_right_padded(
            [rows[i]["prompt_ids"] for i in batch], [rows[i]["response_ids"] for i in batch]
        )
        with torch.inference_mode():
            for reader in readers:
                reader.model(input_ids=ids, attention_mask=mask, use_cache=False)
    return time.perf_counter() - start, _tokens(run)


def stage_train(run: Path, student: str, teacher: str) -> Measure:
    found = dict(load_manifest(run / "checkpoint").config)
    objective = TSDKDConfig(**found.pop("objective"))
    clock = Clock()
    with tempfile.TemporaryDirectory() as place:
        config = TrainConfig(objective=objective, **found | {"epochs": 1, "save_steps": 10**6})
        train_offline(run / "rollouts", run / "scores", student, Path(place) / "c", config, observer=clock)
    return clock.seconds, _tokens(run)


def bare_train(run: Path, student: str, teacher: str) -> Measure:
    """A plain AdamW loop with the cross-entropy of the same responses: no teacher, no selection."""
    config = load_manifest(run / "checkpoint").config
    model = load_model(student, "float32").model.train()
    rows = read_artifact(run / "rollouts", "rollouts").table().select(["prompt_ids", "response_ids"]).to_pylist()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    start = time.perf_counter()
    for at in range(0, len(rows), config["batch_size"]):
        batch = rows[at : at + config["batch_size"]]
        ids, mask, predicting = join_right_padded([r["prompt_ids"] for r in batch], [r["response_ids"] for r in batch])
        labels = torch.where(predicting.roll(1, 1), ids, -100)
        with torch.autocast("cpu", torch.bfloat16, enabled=config["precision"] == "bfloat16"):
            model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start, _tokens(run)


class AsBoth:
    """One of the two models in both roles: what a stage costs for it alone."""

    def __init__(self, work: Callable[..., Measure], which: int) -> None:
        self.work, self.which = work, which

    def __call__(self, run: Path, *models: str) -> Measure:
        return self.work(run, *[models[self.which]] * 2)


def _config(kind: type, artifact: Path) -> Any:
    found = load_manifest(artifact).config
    return kind(**{field.name: found[field.name] for field in fields(kind) if field.name in found})


def _tokens(run: Path) -> int:
    """Of all prompts and responses."""
    rows = read_artifact(run / "rollouts", "rollouts").table().select(["prompt_ids", "response_ids"]).to_pylist()
    return sum(len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows)


def _measured(queue: Any, work: Callable[..., Measure], *arguments: Any) -> None:
    seconds, tokens = work(*arguments)
    queue.put((tokens / seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9))


def main() -> None:
    run, student, teacher = Path(sys.argv[1]), *sys.argv[2:4]
    pairs = {
        "generate (sampled)": (stage_generate, bare_generate),
        "score (read by both)": (stage_score, bare_forward),
        "score, the student as both": (AsBoth(stage_score, 0), AsBoth(bare_forward, 0)),
        "score, the teacher as both": (AsBoth(stage_score, 1), AsBoth(bare_forward, 1)),
        "train, one epoch": (stage_train, bare_train),
    }
    table = Table("", "tokens/s", "bare tokens/s", "ratio", "peak GB", "bare peak GB")
    context = multiprocessing.get_context("spawn")
    wanted = sys.argv[4] if len(sys.argv) > 4 else ""
    for name, works in pairs.items():
        if not name.startswith(wanted):
            continue
        found = []
        for work in works:
            queue = context.Queue()
            process = context.Process(target=_measured, args=(queue, work, run, student, teacher))
            process.start()
            found.append(queue.get())
            process.join()
        (rate, peak), (bare_rate, bare_peak) = found
        row = f"{rate:,.0f}", f"{bare_rate:,.0f}", f"{rate / bare_rate:.2f}", f"{peak:.2f}", f"{bare_peak:.2f}"
        table.add_row(name, *row)
    Console().print(f"{_tokens(run):,} tokens of prompts and responses", table)


if __name__ == "__main__":
    main()
