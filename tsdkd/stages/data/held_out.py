"""Closeness of a model to the teacher on held-out responses: divergence, top-1 agreement and entropies per token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, isnan, nan, sqrt
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor

from tsdkd.core import Divergence, Head, TeacherSignal
from tsdkd.core.distributions import entropy_of, log_probs
from tsdkd.errors import InputError
from tsdkd.stages.data.batches import packed_batches, predicting_hidden
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.data.randomness import random_uniform
from tsdkd.stages.data.source import Sample, Source, collate, sample_turns
from tsdkd.stages.models.language_model import LanguageModel, not_finite_error

CHUNK_TOKENS = 512
"""Tokens whose logits exist at a time."""
BATCH_TOKENS = 8192
"""Tokens per forward pass."""

_Total = tuple[int, Tensor, str]
"""The tokens of a response, the sums of their values, and the name of its teacher; "" for an only one."""


@dataclass(frozen=True)
class HeldOut:
    """Samples with responses that are measured on and never trained on."""

    source: Source
    indices: Sequence[int]


def split_held_out(source: Source, fraction: float) -> tuple[list[int], list[int]]:
    """Indices of the samples that are trained on, and of those that are measured on.

    A prompt's content decides, so every round and seed holds out the same prompts. Raises InputError when either list
    would be empty.
    """
    trained: list[int] = []
    held_out: list[int] = []
    for i in range(len(source)):
        measured = fraction and random_uniform("held out", source.prompt_id(i)) < fraction
        (held_out if measured else trained).append(i)
    if fraction and not (trained and held_out):
        raise InputError(
            f"--held-out {fraction:g} would hold out {len(held_out)} of {len(source)} responses.",
            "Choose another --held-out, or give more prompts.",
        )
    return trained, held_out


def measure_held_out(
    language_model: LanguageModel,
    head: Head,
    held_out: HeldOut,
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[int], None] = lambda _: None,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Any]:
    """Means per response token, in nats; "kl" is KL(teacher || model). "teachers" holds those of each named teacher.

    "top1_agreement" is absent if the source's signal does not know the teacher's most likely token.

    "kl_stderr" takes responses as the independent observations, since tokens of one response are correlated. Each rank
    reads every `world_size`-th batch; all ranks return the same result. `advance` is called with numbers of responses.

    Raises NotFiniteError if the divergence is not finite.
    """
    source, indices = held_out.source, held_out.indices
    batches = list(packed_batches([source.length(i) for i in indices], batch_tokens))
    totals: dict[int, _Total] = {}
    for batch in batches[rank::world_size]:
        samples = [source[indices[i]] for i in batch]
        values = _measure_batch(language_model, head, source, samples)
        by_response = values.split([sum(map(len, sample_turns(s))) for s in samples])
        for i, sample, tokens in zip(batch, samples, by_response, strict=True):
            totals[i] = len(tokens), tokens.sum(0), sample.get("teacher") or ""
        advance(len(batch))
    if world_size > 1:
        totals = {i: total for rank_totals in gather_object([totals]) for i, total in rank_totals.items()}
    measured = _means([totals[i] for i in range(len(indices))])
    if not isfinite(measured["kl"]):
        raise not_finite_error(language_model.name, language_model.model.dtype)
    names = sorted({name for _, _, name in totals.values()} - {""})
    teachers = {name: _means([totals[i] for i in range(len(indices)) if totals[i][2] == name]) for name in names}
    return measured | ({"teachers": teachers} if teachers else {})


def _means(totals: list[_Total]) -> dict[str, Any]:
    """Means per token over some responses."""
    counts = torch.tensor([float(tokens) for tokens, _, _ in totals], dtype=torch.float64)
    sums = torch.stack([values for _, values, _ in totals]).double()
    means = sums.sum(0) / counts.sum()
    variance = (sums[:, 0] - means[0] * counts).square().sum() * len(counts) / max(len(counts) - 1, 1)
    measured = {
        "responses": len(counts),
        "tokens": int(counts.sum()),
        "kl": float(means[0]),
        "kl_stderr": sqrt(float(variance)) / float(counts.sum()),
        "top1_agreement": float(means[1]),
        "entropy": float(means[2]),
        "teacher_entropy": float(means[3]),
    }
    if isnan(measured["top1_agreement"]):
        del measured["top1_agreement"]
    return measured


def require_hidden_signal(samples: OfflineSource) -> None:
    """Raises InputError for scores with another signal."""
    if samples.decoder.signal != "hidden":
        raise InputError(
            f"The held-out scores have the signal {samples.decoder.signal!r}.", "Score them with --signal hidden."
        )


def _measure_batch(language_model: LanguageModel, head: Head, source: Source, samples: list[Sample]) -> Tensor:
    """(tokens, 4) on the CPU: KL, agreement (NaN if unknown), the model's entropy, the teacher's entropy."""
    device = language_model.device
    batch = send_to_device(collate(samples, source, packed=True), device)
    with torch.no_grad():
        hidden = predicting_hidden(language_model, batch)
        teacher = source.signal(batch)
        chunks = [
            _measure_chunk(head, hidden[start : start + CHUNK_TOKENS], teacher.take(slice(start, start + CHUNK_TOKENS)))
            for start in range(0, len(hidden), CHUNK_TOKENS)
        ]
    return torch.cat(chunks).cpu()


def _measure_chunk(head: Head, hidden: Tensor, teacher: TeacherSignal) -> Tensor:
    teacher = teacher.materialized()
    log_q = log_probs(head.logits(hidden))
    divergence = teacher.divergence(log_q, Divergence.jsd(0), temperature=1)
    agreement = teacher.top1_agreement(log_q)
    if agreement is None:
        agreement = torch.full_like(divergence, nan)
    return torch.stack([divergence, agreement, entropy_of(log_q), teacher.entropy(1)], -1)
