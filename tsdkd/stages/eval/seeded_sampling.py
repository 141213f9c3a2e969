"""Sampling in which the tokens of a response depend on its own seed alone, not on its batch."""

from collections.abc import Sequence
from hashlib import sha256

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tsdkd.stages.data.batches import Ids
from tsdkd.stages.engines.transformers_engine import nucleus_logits


def response_seed(seed: int, prompt_ids: Ids, sample: int) -> int:
    """The seed of one response, of 63 bits; no two samples and no two prompts share one."""
    digest = sha256(f"{seed} {sample} {list(prompt_ids)}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


class SeededSampling(LogitsProcessor):
    """Makes greedy decoding sample: the maximum of logits with Gumbel noise has the probabilities of their softmax.

    Each response draws from a generator of its own, so that it does not depend on its batch.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float, device: torch.device) -> None:
        """`seeds`: one for each row of the batch."""
        self.temperature, self.top_p = temperature, top_p
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (batch, vocab) with noise."""
        logits = nucleus_logits(scores.float() / self.temperature, self.top_p)
        noise = torch.empty_like(logits)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return logits - noise.log()
