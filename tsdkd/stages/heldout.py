"""How close a model is to the teacher on held-out responses: divergence, agreement and entropy per token.

The teacher is not loaded: its distribution comes from scores with the signal "hidden".
"""

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch

from tsdkd.core import TeacherHidden
from tsdkd.core.distributions import entropy_of, log_probs
from tsdkd.errors import InputError
from tsdkd.stages.batches import by_length, join
from tsdkd.stages.models import LanguageModel
from tsdkd.stages.sampling import sample
from tsdkd.stages.signals import Decoder
from tsdkd.stages.staged import StagedSamples

CHUNK_TOKENS = 512


def measure(
    language_model: LanguageModel, samples: StagedSamples, batch_tokens: int, advance: Callable[[int], None]
) -> dict[str, Any]:
    """Means per response token, nats: "kl" is KL(teacher || model), with a standard error that knows the responses."""
    decoder = samples.decoder.to(language_model.device)
    totals = {}
    lengths = [samples.length(i) for i in range(len(samples))]
    for batch in by_length(lengths, tokens=batch_tokens):
        chosen = [samples[i] for i in batch]
        ids, attention, predicting = join([s["prompt_ids"] for s in chosen], [s["response_ids"] for s in chosen])
        device = language_model.device
        with torch.inference_mode():
            hidden = language_model.hidden(ids.to(device), attention.to(device))[predicting.to(device)]
            recorded = samples.decoder.tensors(chosen)["hidden"].to(device)
            pieces = [
                _compare(language_model, decoder, h, t)
                for h, t in zip(hidden.split(CHUNK_TOKENS), recorded.split(CHUNK_TOKENS), strict=True)
            ]
        per_token = torch.cat(pieces).split([len(s["response_ids"]) for s in chosen])
        totals.update({i: (len(values), values.sum(0)) for i, values in zip(batch, per_token, strict=True)})
        advance(len(batch))
    counts = torch.tensor([float(totals[i][0]) for i in range(len(samples))], dtype=torch.float64)
    sums = torch.stack([totals[i][1] for i in range(len(samples))]).double()
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


def answer(language_model: LanguageModel, samples: StagedSamples, max_new_tokens: int = 40) -> dict[str, str]:
    """The first held-out prompt and the model's greedy answer to it."""
    prompt = samples.rollouts.table()["messages"][0].as_py()[-1]["content"]
    (ids,) = sample(language_model, [samples.prompt_ids(0)], max_new_tokens, temperature=0)
    return {"prompt": prompt, "answer": language_model.tokenizer.decode(ids, skip_special_tokens=True)}


def require_hidden(samples: StagedSamples) -> None:
    if samples.decoder.signal != "hidden":
        raise InputError(
            f"Held-out scores have the signal {samples.decoder.signal!r}.", "Score them with --signal hidden."
        )


def _compare(
    language_model: LanguageModel, decoder: Decoder, hidden: torch.Tensor, recorded: torch.Tensor
) -> torch.Tensor:
    """(tokens, 4): KL, agreement, the model's entropy, the teacher's."""
    teacher = decoder.decode({"hidden": recorded})
    assert isinstance(teacher, TeacherHidden)
    known = teacher.formed()
    log_q = log_probs(language_model.head.logits(hidden))
    agreement = known.agrees(log_q)
    divergence = known.divergence(log_q, beta=0, temperature=1)
    return torch.stack([divergence, agreement, entropy_of(log_q), known.entropy(1)], -1)
