"""Sampling with transformers: a batch of prompts in, the ids the model produced out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import GenerationConfig, TopPLogitsWarper

from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.batches import Ids, batches_by_length, pad_left
from tsdkd.stages.data.requests import AnyRequestBatch, Request, Response
from tsdkd.stages.models.load import LanguageModel


@dataclass(frozen=True)
class TransformersEngine:
    """One model in this process. The seed is fixed per part: its first request's."""

    language_model: LanguageModel
    config: GenerateConfig

    def sample(
        self, parts: Iterator[AnyRequestBatch], advance: Callable[[int], None]
    ) -> Iterator[tuple[AnyRequestBatch, list[Response]]]:
        for part in parts:
            yield part, self._responses(part.requests, advance)

    def _responses(self, requests: list[Request], advance: Callable[[int], None]) -> list[Response]:
        torch.manual_seed(requests[0].seed)
        config, responses = self.config, dict[int, Response]()
        for batch in batches_by_length([len(request.prompt_ids) for request in requests], size=config.batch_size):
            prompts = [requests[i].prompt_ids for i in batch]
            sampled = sample_responses(
                self.language_model, prompts, config.max_new_tokens, config.temperature, config.top_p
            )
            responses.update({i: Response(ids) for i, ids in zip(batch, sampled, strict=True)})
            advance(len(batch))
        return [responses[i] for i in range(len(requests))]


def sample_responses(
    engine: LanguageModel, prompts: Sequence[Ids], max_new_tokens: int, temperature: float, top_p: float = 1.0
) -> list[list[int]]:
    """One response per prompt, its end token included; temperature 0 is greedy. Uses torch's global random state."""
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=engine.end_ids,
        pad_token_id=engine.end_ids[0],
        suppress_tokens=engine.padding_ids or None,  # rows of the head that stand for no token
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}),
    )
    ids, attention = pad_left(prompts)
    # The model's own config (top-k, repetition penalty) would fill whatever is unset: it steps aside meanwhile.
    with torch.no_grad(), patch.object(engine.model, "generation_config", settings):
        output = engine.model.generate(
            input_ids=ids.to(engine.device), attention_mask=attention.to(engine.device), generation_config=settings
        )
    return [_until_end(row, engine.end_ids) for row in output[:, ids.shape[1] :].tolist()]


def nucleus_logits(logits: Tensor, top_p: float) -> Tensor:
    """Logits (..., vocab) with -inf outside the likeliest tokens that hold `top_p`."""
    kept: Tensor = logits if top_p >= 1 else TopPLogitsWarper(top_p)(None, logits)
    return kept


def _until_end(ids: list[int], end_ids: list[int]) -> list[int]:
    """Ids up to the first end token, which is kept."""
    end = next((i for i, token in enumerate(ids) if token in end_ids), len(ids))
    return ids[: end + 1]
