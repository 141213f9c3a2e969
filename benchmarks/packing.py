"""Packed batches beside padded ones: differences, memory of a training step per token, and tokens per second.

    python -m benchmarks.packing [RUN STUDENT TEACHER] [--tiny]

RUN is a run directory with rollouts and scores of STUDENT and TEACHER; without it there are no rates. Rates count
tokens of prompts and responses; padded and packed measurements alternate, and the table has the fastest of each.
Memory is the peak above weights and inputs, of a process of its own: one sequence, gradient checkpointing, float32.
"""

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.stages import Clock
from tests.helpers.families import FAMILIES, PACKING_CASES, tiny
from tsdkd.artifacts.reader import read_artifact
from tsdkd.core import Head, TeacherHidden, TSDKDConfig, token_selective_loss_from_hidden
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import TrainConfig
from tsdkd.stages.data.batches import join_sequences
from tsdkd.stages.data.rollout_lengths import sequence_lengths
from tsdkd.stages.models.attributes import replaced_attribute
from tsdkd.stages.models.language_model import LanguageModel, decoder_of, hidden_states, output_head
from tsdkd.stages.models.packed_attention import training_attention
from tsdkd.stages.score.stage import score
from tsdkd.stages.train.stage import train_offline

LENGTHS = [12, 7, 3]
"""Of the sequences whose differences are measured."""
ATTENTION: dict[str, dict[str, Any]] = {
    "full": {"model_type": "llama"},
    "window of 1,024": {"model_type": "mistral", "sliding_window": 1024},
    "soft-cap": {"model_type": "gemma2", "sliding_window": 4096, "query_pre_attn_scalar": 32},
}
SHAPE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 65536,
    "pad_token_id": 0,
}
MEMORY_TOKENS = [1024 << i for i in range(6)]
ROUNDS = 3


def differences(family: str) -> tuple[float, float]:
    """Relative differences between packed sequences and each one alone: of hidden states, of all gradients."""
    model = tiny(family, **PACKING_CASES.get(family, {})).model
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(258, (1, length), generator=generator) for length in LENGTHS]
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    weights = torch.randn(sum(LENGTHS), model.get_input_embeddings().weight.shape[1], generator=generator)

    def measured(hidden: Tensor) -> tuple[Tensor, Tensor]:
        (hidden[0] * weights).sum().backward()
        grads = torch.cat([value.grad.flatten() for value in model.parameters() if value.grad is not None])
        model.zero_grad()
        return hidden.detach(), grads

    alone = measured(torch.cat([hidden_states(model, row, torch.ones_like(row)) for row in ids], 1))
    packed = measured(hidden_states(model, torch.cat(ids, 1), None, positions))
    hidden, grad = (float((a - b).norm() / b.norm()) for a, b in zip(packed, alone, strict=True))
    return hidden, grad


def measure_peak(attention: str, tokens: int, part: str, queue: Any) -> None:
    """Puts the bytes above weights, gradients and inputs that a "step", or the "objective" alone, takes at its peak."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SHAPE | ATTENTION[attention])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    model.gradient_checkpointing_enable()
    config = decoder_of(model).config
    config._attn_implementation = training_attention(config)  # noqa: SLF001
    _run(model, 128, part)  # loads libraries and makes gradients
    queue.put(_run(model, tokens, part))


def _run(model: PreTrainedModel, tokens: int, part: str) -> int:
    """Bytes of one step with one sequence, a quarter of which is the prompt."""
    prompt, vocab = tokens // 4, SHAPE["vocab_size"]
    ids = torch.randint(vocab, (tokens,)).tolist()
    batch = join_sequences([ids[:prompt]], [ids[prompt:]], [[range(tokens - prompt)]], packed=True)
    head = output_head(model, vocab)
    teacher = TeacherHidden(torch.randn(tokens - prompt, SHAPE["hidden_size"]), Head(head.weight.detach().clone()))
    hidden = torch.randn(tokens - prompt, SHAPE["hidden_size"], requires_grad=True)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    if part == "step":
        hidden = hidden_states(model, batch["input_ids"], None, batch["position_ids"])[batch["predicting"]]
    loss, _ = token_selective_loss_from_hidden(hidden, head, teacher, batch["response_mask"], TSDKDConfig())
    loss.backward()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak(attention: str, tokens: int, part: str) -> int:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure_peak, args=(attention, tokens, part, queue))
    process.start()
    found: int = queue.get()
    process.join()
    return found


def score_seconds(run: Path, student: str, teacher: str, packed: bool) -> float:
    clock, config = Clock(), ScoreConfig()
    padded = replaced_attribute(LanguageModel, "packing_problem", "is measured with padding")
    with tempfile.TemporaryDirectory() as directory, nullcontext() if packed else padded:
        score(run / "rollouts", student, teacher, Path(directory) / "s", config, clock)
    return clock.seconds


def train_seconds(run: Path, student: str, teacher: str, packed: bool) -> float:
    """One epoch, with micro-batches of eight responses, or of as many tokens as these have on average."""
    clock, lengths = Clock(), _lengths(run)
    tokens = max(8 * sum(lengths) // len(lengths), *lengths)
    limit = {"micro_batch_tokens": tokens} if packed else {"micro_batch_size": 8}
    config = TrainConfig(epochs=1, batch_size=16, save_steps=10**6, gradient_checkpointing=True, **limit)
    with tempfile.TemporaryDirectory() as directory:
        train_offline(run / "rollouts", run / "scores", student, Path(directory) / "c", config, observer=clock)
    return clock.seconds


def _lengths(run: Path) -> list[int]:
    return sequence_lengths(read_artifact(run / "rollouts", "rollouts").table())


def show_differences(console: Console) -> None:
    table = Table("family", "hidden states", "gradients", title="Packed beside alone, relative differences")
    for family in [*FAMILIES, *(name for name in PACKING_CASES if name not in FAMILIES)]:
        table.add_row(family, *(f"{value:.0e}" for value in differences(family)))
    console.print(table)


def show_memory(console: Console, sizes: list[int]) -> None:
    header = [f"{size:,}" for size in sizes]
    table = Table("attention", *header, title="Peak of a packed step, bytes per token; the objective in MB")
    for attention in ATTENTION:
        table.add_row(attention, *(f"{peak(attention, size, 'step') / size:,.0f}" for size in sizes))
    table.add_row("objective, MB", *(f"{peak('full', size, 'objective') / 1e6:,.0f}" for size in sizes))
    console.print(table)


def show_rates(console: Console, run: Path, student: str, teacher: str, rounds: int) -> None:
    lengths = sorted(_lengths(run))
    spread = f"{len(lengths)} sequences of {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}"
    table = Table("", "padded, tokens/s", "packed, tokens/s", "ratio", title=spread)
    measures: dict[str, Callable[[Path, str, str, bool], float]] = {"score": score_seconds, "train": train_seconds}
    for name, measure in measures.items():
        seconds = [(measure(run, student, teacher, False), measure(run, student, teacher, True)) for _ in range(rounds)]
        padded_rate, packed_rate = (sum(lengths) / min(values) for values in zip(*seconds, strict=True))
        table.add_row(name, f"{padded_rate:,.0f}", f"{packed_rate:,.0f}", f"{packed_rate / padded_rate:.2f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="*", metavar="RUN STUDENT TEACHER")
    parser.add_argument("--tiny", action="store_true", help="short sequences and one round")
    options = parser.parse_args()
    console = Console(width=120)
    show_differences(console)
    show_memory(console, [256, 512] if options.tiny else MEMORY_TOKENS)
    if options.run:
        run, student, teacher = options.run
        show_rates(console, Path(run), student, teacher, 1 if options.tiny else ROUNDS)


if __name__ == "__main__":
    main()
