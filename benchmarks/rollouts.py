"""tsdkd generate with vLLM compared with bare vLLM: tokens per second on the same prompts, and memory over time.

    python benchmarks/rollouts.py PROMPTS STUDENT [COUNT [MAX_NEW_TOKENS [MEMORY_FRACTION]]]

The baseline calls `LLM.generate` once, on as many prompts as one part has, without a seed per request, and stores
nothing. Both run one after the other, and each loads the model. Rates exclude loading and the engine check.
"""

import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.prompts import Prompts
from tsdkd.stages.engines.vllm_engine import VllmEngine
from tsdkd.stages.engines.vllm_process import ENVIRONMENT
from tsdkd.stages.generate import sampling, stage
from tsdkd.stages.generate.requests import Authorship, PromptRequests
from tsdkd.stages.models.spec import load_spec
from tsdkd.stages.observer import SilentObserver

PART_SIZE = 500
INTERVAL = 5.0
"""Seconds between two measurements of memory."""


@dataclass(frozen=True)
class Measurement:
    tokens: int
    """Sampled response tokens."""
    sampling_seconds: float
    total_seconds: float
    """With loading."""

    @property
    def rate(self) -> float:
        return self.tokens / self.sampling_seconds

    def row(self, name: str) -> tuple[str, ...]:
        return name, f"{self.tokens:,}", f"{self.rate:,.0f}", f"{self.total_seconds:,.0f}"


class MemoryObserver(SilentObserver):
    """Records the memory of this process and of its children over the number of finished responses."""

    def __init__(self) -> None:
        self.responses, self.memory, self.started = 0, list[tuple[int, float, float]](), 0.0
        self.running = True
        threading.Thread(target=self._measure, daemon=True).start()

    def _measure(self) -> None:
        while self.running:
            if self.started:
                children = sum(map(resident_gb, child_ids(os.getpid())))
                self.memory.append((self.responses, resident_gb(os.getpid()), children))
            time.sleep(INTERVAL)

    @contextmanager
    def progress(self, *_: Any) -> Iterator[Callable[[int], None]]:
        yield self._advance

    def _advance(self, count: int) -> None:
        self.responses += count


def resident_gb(process: int) -> float:
    """Memory of a process in GB, 0 after its end."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    except OSError:
        return 0.0


def child_ids(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def measure_generate(prompts: Path, student: str, config: GenerateConfig) -> tuple[Measurement, MemoryObserver]:
    observer, check_engine = MemoryObserver(), sampling.check_engine

    def check_then_start_clock(*arguments: Any) -> None:
        check_engine(*arguments)
        observer.started = time.perf_counter()

    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as directory,
        patch.object(sampling, "check_engine", check_then_start_clock),
    ):
        rollouts = stage.generate(prompts, student, Path(directory) / "rollouts", config, observer=observer)
        observer.running = False
        end = time.perf_counter()
        tokens = rollouts.manifest.summary["response_tokens"]
        return Measurement(tokens, end - observer.started, end - start), observer


def measure_bare_vllm(prompts: Path, student: str, config: GenerateConfig) -> Measurement:
    os.environ.update(ENVIRONMENT)
    start = time.perf_counter()
    from vllm import LLM, SamplingParams

    model = load_spec(student)
    source = PromptRequests(Prompts(prompts, limit=PART_SIZE), model.tokenizer, config, PART_SIZE, 0)
    (part,) = source.parts(Authorship("student"), source.count())
    max_tokens = max(len(request.prompt_ids) for request in part.requests) + config.max_new_tokens
    engine = VllmEngine(model, config, max_tokens)
    plain = ("model", "skip_tokenizer_init", "generation_config", "dtype", "gpu_memory_utilization", "max_model_len")
    llm = LLM(**{name: engine.arguments[name] for name in plain})
    parameters = SamplingParams(**engine.sampling)
    loaded = time.perf_counter()
    inputs = [{"prompt_token_ids": request.prompt_ids} for request in part.requests]
    outputs = llm.generate(inputs, parameters, use_tqdm=False)
    end = time.perf_counter()
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return Measurement(tokens, end - loaded, end - start)


def main() -> None:
    prompts, student, *numbers = sys.argv[1:]
    count, tokens, fraction = [*numbers, *("2000", "64", "0.2")[len(numbers) :]]
    config = GenerateConfig(
        engine="vllm",
        limit=int(count),
        max_new_tokens=int(tokens),
        memory_fraction=float(fraction),
        part_size=PART_SIZE,
    )
    generated, observer = measure_generate(Path(prompts), student, config)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as process:
        bare = process.submit(measure_bare_vllm, Path(prompts), student, config).result()
    table = Table("", "tokens", "tokens/s", "total seconds")
    table.add_row(*generated.row("tsdkd generate"))
    table.add_row(*bare.row("bare vLLM"))
    Console().print(table, f"ratio {generated.rate / bare.rate:.2f}")
    memory = Table("finished responses", "GB of tsdkd", "GB of vLLM")
    step = max(1, len(observer.memory) // 10)
    for responses, own, children in observer.memory[::step]:
        memory.add_row(f"{responses:,}", f"{own:.2f}", f"{children:.2f}")
    Console().print(memory)


if __name__ == "__main__":
    main()
