"""Models by name: fingerprint, load; and the few facts about them that stages need."""

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from tsdkd.core import Head
from tsdkd.errors import InputError
from tsdkd.stages.config.types import DType
from tsdkd.stages.models.adapters import base_model_name
from tsdkd.stages.models.context import context_length
from tsdkd.stages.models.device import auto_dtype, default_device
from tsdkd.stages.models.paths import model_directory
from tsdkd.stages.models.tokenizers import end_token_ids, first_line, load_tokenizer, vocab_size

hf_logging.disable_progress_bar()
hf_logging.set_verbosity_error()

PROBED_LOGIT = 100.0
"""Beyond every soft-cap in use."""


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer, in evaluation mode, on its device."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        hook = getattr(self.model, "_hf_hook", None)  # of a model that is spread over devices
        return torch.device(hook.execution_device if hook else self.model.device)

    @property
    def context(self) -> int:
        """The longest sequence the model was made for, in tokens."""
        return context_length(self.model.config)

    @cached_property
    def end_ids(self) -> list[int]:
        """Ids that end a response."""
        return end_token_ids(self.model.generation_config, self.tokenizer)

    @cached_property
    def padding_ids(self) -> list[int]:
        """Rows of the output head past the tokenizer's last real id."""
        return list(range(vocab_size(self.tokenizer), self.model.get_output_embeddings().weight.shape[0]))

    @cached_property
    def head(self) -> Head:
        """The output head, without gradients, cut to real ids and checked against the model's own logits.

        The check stretches hidden states until logits are as large as `PROBED_LOGIT`, so that a bend shows.
        Raises InputError when the model's logits are others.
        """
        layer: Any = self.model.get_output_embeddings()
        with align_module_device(layer):  # weights that wait on another device
            head = output_head(self.model, vocab_size(self.tokenizer))
            head = replace(head, weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())
        probe = torch.arange(4, device=self.device).unsqueeze(0)
        with torch.no_grad():
            hidden = self.hidden(probe, torch.ones_like(probe)).to(head.weight.device)
            stretch = PROBED_LOGIT / float(head.logits(hidden).abs().max().clamp(min=1e-6))
            with layer.register_forward_pre_hook(lambda _, given: (given[0] * stretch, *given[1:])):
                expected = self.model(input_ids=probe).logits[..., : head.vocab_size].float()
            found = head.logits(hidden * stretch).float().to(expected.device)
        noise = PROBED_LOGIT * max(2 * torch.finfo(head.weight.dtype).eps, 1e-5)
        if not torch.allclose(found, expected, rtol=0, atol=noise, equal_nan=True):
            raise InputError(
                f"{self.name} does more between its last hidden state and its logits than tsdkd knows.",
                "Use a model with a linear head (scale and soft-cap are handled).",
            )
        return head

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states after the last norm: ids and mask (batch, seq) -> (batch, seq, width)."""
        return hidden_states(self.model, input_ids, attention_mask)


def hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states after the last norm: ids and mask (batch, seq) -> (batch, seq, width)."""
    body: Any = model.get_decoder()
    output = body(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids(attention_mask), use_cache=False
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def output_head(model: PreTrainedModel, vocab: int | None) -> Head:
    """A model's own output head, cut to `vocab` ids."""
    config = model.config.get_text_config()
    layer: Any = model.get_output_embeddings()
    weight = layer.weight
    for adapter in getattr(layer, "active_adapters", ()):  # LoRA on the head
        weight = weight + layer.get_delta_weight(adapter)
    return Head(
        weight=weight,
        bias=layer.bias,
        logit_scale=getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1),
        softcap=getattr(config, "final_logit_softcapping", None),
        vocab_size=vocab,
    )


def position_ids(attention_mask: Tensor) -> Tensor:
    """Position ids that do not depend on padding: (batch, seq) -> (batch, seq)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def load_model(
    name: str,
    dtype: DType = "auto",
    device: str | None = None,
    device_map: str | dict[str, str] | None = None,
    attention: str | None = None,
) -> LanguageModel:
    """A model ready to run, without gradients in mind. Raises InputError when transformers cannot load it.

    "auto" is the precision it was saved in, or float32 on a device that has no bf16 (see `auto_dtype`).
    `device_map`: as transformers has it, for a model that one device cannot hold; else all of it is on `device`.
    """
    tokenizer, directory = load_tokenizer(name), model_directory(name)
    base = base_model_name(directory)
    device = device or default_device()
    if attention is None and device == "cpu":
        attention = "eager"  # torch's fused bf16 attention is the slower one there
    source = model_directory(base) if base else directory
    try:
        if dtype == "auto" and device_map is None:
            dtype = auto_dtype(AutoConfig.from_pretrained(source), device)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attention,
            device_map=device_map,
        )
        if base:
            model.load_adapter(str(directory))
    except Exception as error:  # the libraries below raise whatever they like
        raise InputError(
            f"{name} is no causal language model that transformers can load ({first_line(error)}).",
            "Check the directory: config.json, weights and tokenizer are needed.",
        ) from None
    model.eval()
    if device_map is None:
        model.to(device)
    return LanguageModel(name, model, tokenizer)


def cache_dir() -> Path:
    """Where the embedded models live: TSDKD_CACHE, else the user's cache."""
    root = os.environ.get("TSDKD_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tsdkd"
