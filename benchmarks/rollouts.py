"""generate with vLLM beside bare vLLM: the rate on the same prompts, and memory over the run.

    python benchmarks/rollouts.py PROMPTS STUDENT [COUNT [MAX_NEW_TOKENS [MEMORY_FRACTION]]]

Bare is one `LLM.generate` over as many prompts as one of our parts has, without seeds of their own, and nothing
stored. Both run one after the other, each loading the model for itself; rates are of the sampling alone.
"""

import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.prompts import Prompts
from tsdkd.stages.engines.vllm_engine import ENVIRONMENT, VllmEngine
from tsdkd.stages.generate import stage
from tsdkd.stages.generate.requests import PromptRequests
from tsdkd.stages.models.spec import load_spec
from tsdkd.stages.observer import SilentObserver

PART = 500
EVERY = 5.0
"""Seconds between two looks at memory."""


class Watch(SilentObserver):
    """A observer that notes when responses were done, and how large our processes were."""

    def __init__(self) -> None:
        self.done, self.memory, self.started = 0, list[tuple[int, float, float]](), 0.0
        self.running = True
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while self.running:
            if self.started:
                self.memory.append((self.done, rss(os.getpid()), sum(map(rss, children(os.getpid())))))
            time.sleep(EVERY)

    @contextmanager
    def progress(self, *_: Any) -> Iterator[Callable[[int], None]]:
        yield self._advance

    def _advance(self, count: int) -> None:
        self.done += count


def rss(pid: int) -> float:
    """GB in memory."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    except OSError:
        return 0.0


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ours(prompts: Path, student: str, config: GenerateConfig) -> tuple[float, float, int, Watch]:
    watch, sing = Watch(), stage.sing

    def begin(*arguments: Any) -> None:
        sing(*arguments)
        watch.started = time.perf_counter()

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place, patch.object(stage, "sing", begin):
        made = stage.generate(prompts, student, Path(place) / "r", config, observer=watch)
        watch.running = False
        now = time.perf_counter()
        return now - watch.started, now - start, made.manifest.summary["response_tokens"], watch


def bare(prompts: Path, student: str, config: GenerateConfig, queue: Any) -> None:
    os.environ.update(ENVIRONMENT)
    start = time.perf_counter()
    from vllm import LLM, SamplingParams

    model = load_spec(student)
    jobs = PromptRequests(Prompts(prompts, limit=PART), model.tokenizer, config, PART, 0)
    (part,) = jobs.parts("student", jobs.count())
    longest = max(len(job.prompt_ids) for job in part.requests) + config.max_new_tokens
    engine = VllmEngine(model, config, longest)
    kept = ("model", "skip_tokenizer_init", "generation_config", "dtype", "gpu_memory_utilization", "max_model_len")
    llm = LLM(**{name: engine.arguments[name] for name in kept})
    sampling = SamplingParams(**engine.sampling)
    loaded = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": job.prompt_ids} for job in part.requests], sampling, use_tqdm=False)
    now = time.perf_counter()
    queue.put((now - loaded, now - start, sum(len(output.outputs[0].token_ids) for output in outputs)))


def main() -> None:
    prompts, student, *numbers = sys.argv[1:]
    count, tokens, fraction = [*numbers, *("2000", "64", "0.2")[len(numbers) :]]
    config = GenerateConfig(
        engine="vllm", limit=int(count), max_new_tokens=int(tokens), memory_fraction=float(fraction), part_size=PART
    )
    table = Table("", "tokens", "tokens/s", "seconds in all")
    seconds, total, made, watch = ours(Path(prompts), student, config)
    table.add_row("tsdkd generate", f"{made:,}", f"{made / seconds:,.0f}", f"{total:,.0f}")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=bare, args=(Path(prompts), student, config, queue))
    process.start()
    bare_seconds, bare_total, bare_made = queue.get()
    process.join()
    table.add_row("bare vLLM", f"{bare_made:,}", f"{bare_made / bare_seconds:,.0f}", f"{bare_total:,.0f}")
    Console().print(table, f"ratio {made / seconds / (bare_made / bare_seconds):.2f}")
    memory = Table("responses done", "our GB", "vLLM's GB")
    step = max(1, len(watch.memory) // 10)
    for done, own, others in watch.memory[::step]:
        memory.add_row(f"{done:,}", f"{own:.2f}", f"{others:.2f}")
    Console().print(memory)


if __name__ == "__main__":
    main()
