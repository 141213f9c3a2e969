"""One teacher read by transformers, by vLLM offline and by a server: speed, scores, training from them, and memory.

    python -m benchmarks.teacher_readers --prompts PROMPTS --limit 200 --max-new-tokens 128

The student's responses to the prompts are sampled once. Both models are read in float32, every row in a process of its
own. The server is vLLM, on this machine's loopback. Rates count the tokens that both models read, prompts included;
they exclude loading, checks and the warm-up that the estimate of the cost is. With the server, transformers reads the
student in the same time. CPU seconds are those of all processes, the server's too; other work on the machine changes
them less than the time. `topk, transformers` shows what the signal alone changes.

Training from each of the scores makes the same steps with the same seed. All students are measured with the exact
scores by transformers, on the prompts that training holds out. Memory is the peak of the training process; its
parameters are counted after each step.
"""

import argparse
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from tests.helpers.training import distance, live_parameters
from tests.helpers.vllm_server import SETTINGS, serve_vllm
from tsdkd.artifacts.reader import Artifact, read_artifact
from tsdkd.cli.defaults import model
from tsdkd.core import TSDKDConfig
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import OnlineConfig, TrainConfig
from tsdkd.stages.data.held_out import HeldOut, measure_held_out, split_held_out
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.data.rollout_lengths import LENGTH_COLUMNS, sequence_lengths
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.load import load_model
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.score.served import score_served
from tsdkd.stages.score.stage import score
from tsdkd.stages.train.stage import train_offline, train_online, train_served

EXACT, TOP_K, VLLM, SERVER = "transformers", "topk, transformers", "vLLM offline", "topk, server"
SPARE = 4
CONFIGS = {
    EXACT: ScoreConfig(dtype="float32"),
    VLLM: ScoreConfig(dtype="float32", engine="vllm", memory_fraction=0.5),
    TOP_K: ScoreConfig(dtype="float32", signal="topk"),
    SERVER: ScoreConfig(dtype="float32", signal="topk"),
}
"""By reader of the teacher."""
TRAINING = TrainConfig(
    objective=TSDKDConfig(direct_weight=10, em_weight=0.01),
    learning_rate=3e-5,
    epochs=0.4,
    batch_size=8,
    micro_batch_tokens=1024,
    held_out=0.1,
    eval_steps=10_000,
)
RECORDED = OnlineConfig(
    student_fraction=0.0, teacher_dtype="float32", sampling=GenerateConfig(engine="transformers", limit=16)
)
"""Online training from recorded responses: the process holds no more than training and the teacher need."""
VALUES = ("student_entropy", "teacher_entropy", "student_log_prob", "teacher_log_prob")
LISTS = ("candidates", "ranks")


class MeasuringObserver(SilentObserver):
    """Times the progress bar, and counts the parameters of the process at each step of it."""

    started = seconds = cpu_seconds = 0.0
    parameters = 0

    def __init__(self, *, counts: bool, server: int = 0) -> None:
        """`server`: the process of a server whose CPU time counts, too."""
        self.counts, self.server = counts, server

    def info(self, message: str) -> None:
        print(message, flush=True)

    @contextmanager
    def progress(self, *_: Any) -> Iterator[Callable[[int], None]]:
        self.started, cpu = time.perf_counter(), self._cpu()
        yield self._count if self.counts else lambda _: None
        self.seconds, self.cpu_seconds = time.perf_counter() - self.started, self._cpu() - cpu

    def _cpu(self) -> float:
        """Seconds of this process, the server and their children."""
        roots = [psutil.Process(), *([psutil.Process(self.server)] if self.server else [])]
        processes = [process for root in roots for process in (root, *root.children(recursive=True))]
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    def _count(self, _: int) -> None:
        self.parameters = max(self.parameters, sum(parameter.numel() for parameter in live_parameters()))


def score_by(reader: str, run: Path, student: str, teacher: str, url: str = "", server: int = 0) -> dict[str, float]:
    output = run / reader
    observer = MeasuringObserver(counts=False, server=server)
    start = time.perf_counter()
    if reader == SERVER:
        score_served(run / "rollouts", student, url, None, output, CONFIGS[reader], observer, overwrite=True)
    else:
        score(run / "rollouts", student, teacher, output, CONFIGS[reader], observer, overwrite=True)
    return {"seconds": observer.seconds, "cpu": observer.cpu_seconds, "loading": observer.started - start}


def train_from(reader: str, run: Path, student: str, seed: int) -> dict[str, float]:
    observer = MeasuringObserver(counts=True)
    output = run / f"student, {reader}, {seed}"
    train_offline(run / "rollouts", run / reader, student, output, TRAINING, seed, observer, overwrite=True)
    return {"parameters": observer.parameters}


def train_beside(teacher: str, served: bool, run: Path, student: str) -> dict[str, float]:
    """Train online with a loaded teacher, or with the one at an address."""
    observer, output = MeasuringObserver(counts=True), run / "online"
    config = replace(TRAINING, online=RECORDED, held_out=0, eval_steps=0)
    if served:
        config = replace(config, online=replace(RECORDED, teacher_top_k=CONFIGS[SERVER].top_k))
        train_served(run / "rollouts", student, teacher, None, output, config, 0, observer, overwrite=True)
    else:
        train_online(run / "rollouts", student, teacher, output, config, 0, observer, overwrite=True)
    return {"parameters": observer.parameters}


def in_process(work: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """What `work` returns in a process of its own, and the process's "peak" memory in bytes."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, *arguments))
    process.start()
    sender.close()
    result: dict[str, float] = receiver.recv()
    process.join()
    return result


def _send(sender: Any, work: Callable[..., dict[str, float]], *arguments: Any) -> None:
    result = work(*arguments)
    sender.send(result | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024})


def table_of(*columns: str, title: str) -> Table:
    return Table(*columns, title=title, box=MARKDOWN)


def show_rates(results: dict[str, dict[str, float]], tokens: int) -> Table:
    table = table_of("teacher read by", "tokens/s", "tokens per CPU second", "before: s", title=f"{tokens:,} tokens")
    for reader, result in results.items():
        rates = [f"{tokens / result[clock]:,.0f}" for clock in ("seconds", "cpu")]
        table.add_row(reader, *rates, f"{result['loading']:.0f}")
    return table


def show_differences(run: Path, rollouts: Artifact) -> Table:
    """The differences of each column from the scores by transformers."""
    exact = _columns(read_artifact(run / EXACT, "scores"))
    statistics = (f"{reader}: {name}" for reader in (VLLM, SERVER) for name in ("mean", "largest"))
    table = table_of("column", *statistics, title="Differences")
    others = [_columns(read_artifact(run / reader, "scores")) for reader in (VLLM, SERVER)]
    for name in (*VALUES, *LISTS):
        cells = []
        for columns in others:
            difference = np.abs(columns[name].astype(float) - exact[name])
            if name in LISTS:
                cells += [f"{np.mean(difference != 0):.2%} of places", ""]
            else:
                cells += [f"{difference.mean():.2g}", f"{difference.max():.2g}"]
        table.add_row(name, *cells)
    return table


def _columns(scores: Artifact) -> dict[str, np.ndarray[Any, Any]]:
    """All responses, one after the other."""
    table = scores.table([*VALUES, *LISTS])
    return {name: table[name].combine_chunks().flatten().to_numpy() for name in table.column_names}


def show_training(run: Path, student: str) -> Table:
    """The trained students: distance of their weights from that by the exact scores, and their held-out divergence."""
    source = OfflineSource(run / "rollouts", run / EXACT)
    held_out = HeldOut(source, split_held_out(source, TRAINING.held_out)[1])
    start, exact = _weights(student), _weights(run / f"student, {EXACT}, 0")
    trained = TRAINING.epochs * (len(source) - len(held_out.indices))
    title = f"about {trained:.0f} responses trained on, {len(held_out.indices)} held out"
    table = table_of("scores", "apart / weights", "apart / update", "held-out KL", "top-1 agreement", title=title)
    size, update = sum(float(w.square().sum()) for w in exact.values()) ** 0.5, distance(exact, start)
    names = {"student before": student, **{r: str(run / f"student, {r}, 0") for r in CONFIGS}}
    for name, path in {**names, f"{EXACT}, another seed": str(run / f"student, {EXACT}, 1")}.items():
        reader = load_model(path, "float32")
        measured = measure_held_out(reader, reader.head, held_out)
        apart = distance(_weights(path), exact)
        kl = f"{measured['kl']:.4f} ± {measured['kl_stderr']:.4f}"
        table.add_row(name, f"{apart / size:.2g}", f"{apart / update:.2g}", kl, f"{measured['top1_agreement']:.3f}")
    return table


def _weights(path: str | Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path, dtype="float32").state_dict()


def show_memory(results: dict[str, dict[str, float]], student: str, teacher: str) -> Table:
    sizes = [load_model(name).model.num_parameters() / 1e6 for name in (student, teacher)]
    title = f"student {sizes[0]:,.0f} million parameters, teacher {sizes[1]:,.0f}"
    table = table_of("training", "peak GB", "million parameters in the process", title=title)
    for name, result in results.items():
        table.add_row(name, f"{result['peak'] / 1e9:.2f}", f"{result['parameters'] / 1e6:,.0f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--max-prompt-tokens", type=int, default=512)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--student", default="embedded-student")
    parser.add_argument("--teacher", default="embedded-teacher")
    parser.add_argument("--out", type=Path, help="directory that keeps the artifacts; default: a temporary one")
    options = parser.parse_args()
    student, teacher = model(options.student), model(options.teacher)
    os.environ |= SETTINGS
    show = Console(width=140).print
    with tempfile.TemporaryDirectory() as temporary:
        run = options.out or Path(temporary)
        run.mkdir(parents=True, exist_ok=True)
        sampling = GenerateConfig(
            engine="transformers",
            temperature=0.5,
            max_prompt_tokens=options.max_prompt_tokens,
            max_new_tokens=options.max_new_tokens,
            limit=options.limit,
        )
        rollouts = generate(options.prompts, student, run / "rollouts", sampling)
        tokens = sum(sum(sequence_lengths(rollouts.read_part(part, LENGTH_COLUMNS))) for part in rollouts.tables)
        spare = str(CONFIGS[SERVER].top_k + SPARE)
        models = run, student, teacher
        with serve_vllm(teacher, run / "server.log", "--max-logprobs", spare) as server:
            rates = {SERVER: in_process(score_by, SERVER, *models, server.url, server.pid)}
            memory = {"online, teacher served": in_process(train_beside, server.url, True, run, student)}
        memory["online, teacher loaded"] = in_process(train_beside, teacher, False, run, student)
        rates |= {reader: in_process(score_by, reader, *models) for reader in CONFIGS if reader != SERVER}
        show(show_rates(rates, tokens), show_differences(run, rollouts))
        for reader in CONFIGS:
            memory[f"offline, {reader}"] = in_process(train_from, reader, run, student, 0)
        in_process(train_from, EXACT, run, student, 1)
        show(show_training(run, student), show_memory(memory, student, teacher))


if __name__ == "__main__":
    main()
