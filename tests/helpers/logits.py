"""Logits of a model's own forward."""

import torch

from tsdkd.stages.models.language_model import LanguageModel


def bare_logits(model: LanguageModel, row: dict[str, list[int]]) -> torch.Tensor:
    """Logits (response tokens, vocab without padding rows) of the model's own forward."""
    ids = torch.tensor([row["prompt_ids"] + row["response_ids"]])
    with torch.no_grad():
        logits = model.model(ids).logits[0]
    return logits[len(row["prompt_ids"]) - 1 : -1, : len(model.tokenizer)]
