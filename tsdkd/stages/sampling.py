"""Sampling with transformers: a batch of prompts in, the ids the model produced out."""

from collections.abc import Sequence
from unittest.mock import patch

import torch
from transformers import GenerationConfig

from tsdkd.stages.batches import Ids, pad_left
from tsdkd.stages.models import LanguageModel


def sample(
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
    with torch.inference_mode(), patch.object(engine.model, "generation_config", settings):
        output = engine.model.generate(
            input_ids=ids.to(engine.device), attention_mask=attention.to(engine.device), generation_config=settings
        )
    return [_until_end(row, engine.end_ids) for row in output[:, ids.shape[1] :].tolist()]


def _until_end(ids: list[int], end_ids: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in end_ids), len(ids))
    return ids[: end + 1]
