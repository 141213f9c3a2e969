"""Rate and peak memory of each stage, compared with a bare transformers loop over the same sequences.

    python benchmarks/stages.py RUN STUDENT TEACHER [ROW]

RUN is the run directory of a finished quickstart. ROW selects the rows whose name starts with it. Each measurement runs
in a process of its own. Its peak memory includes loading, its time does not. Each row counts the tokens that it sampled
itself.
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
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
from tsdkd.stages.data.batches import batches_by_length, join_sequences, pad_left, pad_right
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.load import load_model
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.score.stage import score
from tsdkd.stages.train.stage import train_offline

Measurement = tuple[float, int]
"""Seconds, and tokens read or sampled."""


class Clock(SilentObserver):
    """Measures the time of a stage's progress bar, which excludes loading."""

    seconds = 0.0

    @contextmanager
    def progress(self, *_: Any) -> Iterator[Callable[[int], None]]:
        start = time.perf_counter()
        yield lambda _: None
        self.seconds = time.perf_counter() - start


def measure_generate(run: Path, student: str, teacher: str) -> Measurement:
    config = _config(GenerateConfig, run / "rollouts")
    clock = Clock()
    prompts = (run / "rollouts" / load_manifest(run / "rollouts").parents[0].path).resolve()
    with tempfile.TemporaryDirectory() as directory:
        seed = load_manifest(run / "rollouts").seed
        rollouts = generate(prompts, student, Path(directory) / "rollouts", config, seed, clock)
        return clock.seconds, rollouts.manifest.summary["response_tokens"]


def bare_generate(run: Path, student: str, teacher: str) -> Measurement:
    """`model.generate` on the same prompts, sorted by length; stores nothing."""
    config = _config(GenerateConfig, run / "rollouts")
    model = load_model(student)
    prompts = read_artifact(run / "rollouts", "rollouts").table()["prompt_ids"].to_pylist()
    settings = GenerationConfig(
        do_sample=True, top_k=0, temperature=config.temperature, max_new_tokens=config.max_new_tokens
    )
    tokens, start = 0, time.perf_counter()
    for batch in batches_by_length([len(p) for p in prompts], size=config.batch_size):
        ids, mask = pad_left([prompts[i] for i in batch])
        with torch.inference_mode():
            output = model.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        ended = (output[:, ids.shape[1] :] == model.end_ids[0]).long().cumsum(-1)
        tokens += int((ended == 0).sum() + (ended.max(-1).values > 0).sum())
    return time.perf_counter() - start, tokens


def measure_score(run: Path, student: str, teacher: str) -> Measurement:
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        score(run / "rollouts", student, teacher, Path(directory) / "s", _config(ScoreConfig, run / "scores"), clock)
    return clock.seconds, _tokens(run)


def bare_forward(run: Path, student: str, teacher: str) -> Measurement:
    """The forward of both models, in padded batches of `--batch-tokens`; computes the logits of all positions."""
    config = _config(ScoreConfig, run / "scores")
    models = load_model(student, config.dtype), load_model(teacher, config.dtype)
    rows = read_artifact(run / "rollouts", "rollouts").table().select(["prompt_ids", "response_ids"]).to_pylist()
    start = time.perf_counter()
    lengths = [len(r["prompt_ids"]) + len(r["response_ids"]) for r in rows]
    for batch in batches_by_length(lengths, tokens=config.batch_tokens):
        ids, mask = pad_right([rows[i]["prompt_ids"] + rows[i]["response_ids"] for i in batch])
        with torch.inference_mode():
            for model in models:
                model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    return time.perf_counter() - start, _tokens(run)


def measure_train(run: Path, student: str, teacher: str) -> Measurement:
    recorded = dict(load_manifest(run / "checkpoint").config)
    objective = TSDKDConfig(**recorded.pop("objective"))
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        config = TrainConfig(objective=objective, **recorded | {"epochs": 1, "save_steps": 10**6})
        train_offline(run / "rollouts", run / "scores", student, Path(directory) / "c", config, observer=clock)
    return clock.seconds, _tokens(run)


def bare_train(run: Path, student: str, teacher: str) -> Measurement:
    """An AdamW loop on the cross-entropy of the same responses."""
    config = load_manifest(run / "checkpoint").config
    model = load_model(student, "float32").model.train()
    rows = read_artifact(run / "rollouts", "rollouts").table().select(["prompt_ids", "response_ids"]).to_pylist()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    start = time.perf_counter()
    for first in range(0, len(rows), config["batch_size"]):
        batch = rows[first : first + config["batch_size"]]
        responses = [r["response_ids"] for r in batch]
        inputs = join_sequences([r["prompt_ids"] for r in batch], responses, [[range(len(ids))] for ids in responses])
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        labels = torch.where(inputs["predicting"].roll(1, 1), ids, -100)
        with torch.autocast("cpu", torch.bfloat16, enabled=config["precision"] == "bfloat16"):
            model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start, _tokens(run)


class AsBoth:
    """Measures a stage with one of the two models in both roles."""

    def __init__(self, measure: Callable[..., Measurement], index: int) -> None:
        self.measure, self.index = measure, index

    def __call__(self, run: Path, *models: str) -> Measurement:
        return self.measure(run, *[models[self.index]] * 2)


def _config(kind: type, artifact: Path) -> Any:
    recorded = load_manifest(artifact).config
    return kind(**{field.name: recorded[field.name] for field in fields(kind) if field.name in recorded})


def _tokens(run: Path) -> int:
    """The number of tokens in all prompts and responses."""
    rows = read_artifact(run / "rollouts", "rollouts").table().select(["prompt_ids", "response_ids"]).to_pylist()
    return sum(len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows)


def _rate_and_peak(measure: Callable[..., Measurement], *arguments: Any) -> tuple[float, float]:
    """Tokens per second, and the peak memory of this process in GB."""
    seconds, tokens = measure(*arguments)
    return tokens / seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    run, student, teacher = Path(sys.argv[1]), *sys.argv[2:4]
    pairs = {
        "generate (sampled tokens)": (measure_generate, bare_generate),
        "score": (measure_score, bare_forward),
        "score, student in both roles": (AsBoth(measure_score, 0), AsBoth(bare_forward, 0)),
        "score, teacher in both roles": (AsBoth(measure_score, 1), AsBoth(bare_forward, 1)),
        "train, one epoch": (measure_train, bare_train),
    }
    table = Table("", "tokens/s", "bare tokens/s", "ratio", "peak GB", "bare peak GB")
    context = multiprocessing.get_context("spawn")
    selected = sys.argv[4] if len(sys.argv) > 4 else ""
    for name, measures in pairs.items():
        if not name.startswith(selected):
            continue
        results = []
        for measure in measures:
            with ProcessPoolExecutor(1, context) as process:
                results.append(process.submit(_rate_and_peak, measure, run, student, teacher).result())
        (rate, peak), (bare_rate, bare_peak) = results
        row = f"{rate:,.0f}", f"{bare_rate:,.0f}", f"{rate / bare_rate:.2f}", f"{peak:.2f}", f"{bare_peak:.2f}"
        table.add_row(name, *row)
    Console().print(f"{_tokens(run):,} tokens of prompts and responses", table)


if __name__ == "__main__":
    main()
