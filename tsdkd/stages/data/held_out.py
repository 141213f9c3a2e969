"""How close a model is to the teacher on held-out responses: divergence, agreement and entropy per token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from tsdkd.core import Divergence, Head, TeacherHidden, TeacherSignal
from tsdkd.core.distributions import entropy_of, log_probs
from tsdkd.errors import InputError
from tsdkd.stages.data.batches import batches_by_length
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.data.sources import Source, collate, predicting_hidden
from tsdkd.stages.models.load import LanguageModel

CHUNK_TOKENS = 512
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class HeldOut:
    """Samples, with responses, that nothing learns from."""

    source: Source
    indices: Sequence[int]


def measure_held_out(
    language_model: LanguageModel,
    head: Head,
    held_out: HeldOut,
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[int], None] = lambda _: None,
    process: int = 0,
    processes: int = 1,
) -> dict[str, Any]:
    """Means per response token, nats: "kl" is KL(teacher || model), with a standard error that knows the responses.

    Each of several processes reads its share of the batches; all get the same result.
    """
    source, indices = held_out.source, held_out.indices
    batches = list(batches_by_length([source.length(i) for i in indices], tokens=batch_tokens))
    totals: dict[int, tuple[int, Tensor]] = {}
    for batch in batches[process::processes]:
        samples = [source[indices[i]] for i in batch]
        per_token = _measure_batch(language_model, head, source, samples)
        split = per_token.split([len(s["response_ids"]) for s in samples])
        totals.update({i: (len(values), values.sum(0)) for i, values in zip(batch, split, strict=True)})
        advance(len(batch))
    if processes > 1:
        totals = {i: found for part in gather_object([totals]) for i, found in part.items()}
    counts = torch.tensor([float(totals[i][0]) for i in range(len(indices))], dtype=torch.float64)
    sums = torch.stack([totals[i][1] for i in range(len(indices))]).double()
    means = sums.sum(0) / counts.sum()
    spread = (sums[:, 0] - means[0] * counts).square().sum() * len(counts) / max(len(counts) - 1, 1)
    return {
        "responses": len(counts),
        "tokens": int(counts.sum()),
        "kl": float(means[0]),
        "kl_stderr": sqrt(float(spread)) / float(counts.sum()),
        "agreement": float(means[1]),
        "entropy": float(means[2]),
        "teacher_entropy": float(means[3]),
    }


def require_hidden_signal(samples: OfflineSource) -> None:
    if samples.decoder.signal != "hidden":
        raise InputError(
            f"Held-out scores have the signal {samples.decoder.signal!r}.", "Score them with --signal hidden."
        )


def _measure_batch(language_model: LanguageModel, head: Head, source: Source, samples: list[dict[str, Any]]) -> Tensor:
    """(tokens, 4), on the CPU: KL, agreement, the model's entropy, the teacher's."""
    device = language_model.device
    batch = collate(samples, source)
    batch |= {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "response_mask")}
    batch["recorded"] = {name: value.to(device) for name, value in batch["recorded"].items()}
    with torch.no_grad():
        hidden = predicting_hidden(
            language_model.hidden(batch["input_ids"], batch["attention_mask"]), batch["response_mask"]
        )
        teacher = source.signal(batch)
        pieces = [
            _compare(head, hidden[start : start + CHUNK_TOKENS], teacher.take(slice(start, start + CHUNK_TOKENS)))
            for start in range(0, len(hidden), CHUNK_TOKENS)
        ]
    return torch.cat(pieces).cpu()


def _compare(head: Head, hidden: Tensor, teacher: TeacherSignal | TeacherHidden) -> Tensor:
    known = teacher.formed() if isinstance(teacher, TeacherHidden) else teacher
    log_q = log_probs(head.logits(hidden))
    divergence = known.divergence(log_q, Divergence.jsd(0), temperature=1)
    return torch.stack([divergence, known.agrees(log_q), entropy_of(log_q), known.entropy(1)], -1)
