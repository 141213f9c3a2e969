"""A causal language model in memory: loaded by name, read as hidden states and an output head."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from tsdkd.core import Head
from tsdkd.errors import InputError, first_line
from tsdkd.stages.config.types import DType
from tsdkd.stages.models.adapters import base_model_name
from tsdkd.stages.models.context import context_length
from tsdkd.stages.models.device import auto_dtype, default_device
from tsdkd.stages.models.paths import model_directory
from tsdkd.stages.models.tokenizers import end_token_ids, load_tokenizer, vocab_size

hf_logging.disable_progress_bar()
hf_logging.set_verbosity_error()

PROBE_LOGIT = 100.0
"""Exceeds every softcap in use."""


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer, in evaluation mode, on its device."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def device(self) -> torch.device:
        """The device of the model's inputs."""
        hook = getattr(self.model, "_hf_hook", None)  # accelerate's, on a model that is spread over devices
        return torch.device(hook.execution_device if hook else self.model.device)

    @property
    def context(self) -> int:
        """The longest sequence that the model reads, in tokens."""
        return context_length(self.model.config)

    @cached_property
    def end_ids(self) -> list[int]:
        """Ids that end a response."""
        return end_token_ids(self.model.generation_config, self.tokenizer)

    @cached_property
    def padding_ids(self) -> list[int]:
        """Rows of the output head past the tokenizer's largest id."""
        return list(range(vocab_size(self.tokenizer), self.model.get_output_embeddings().weight.shape[0]))

    @cached_property
    def head(self) -> Head:
        """The output head, without gradients, cut to the tokenizer's ids.

        The head's logits are compared with the model's own. The comparison scales hidden states until the largest
        logit is `PROBE_LOGIT`, so that a softcap changes it. Raises InputError if the logits differ.
        """
        layer: Any = self.model.get_output_embeddings()
        with align_module_device(layer):  # loads weights that are offloaded from the device
            head = output_head(self.model, vocab_size(self.tokenizer))
            head = replace(head, weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())
        probe = torch.arange(4, device=self.device).unsqueeze(0)
        with torch.no_grad():
            hidden = self.hidden(probe, torch.ones_like(probe)).to(head.weight.device)
            scale = PROBE_LOGIT / float(head.logits(hidden).abs().max().clamp(min=1e-6))
            with layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * scale, *inputs[1:])):
                expected = self.model(input_ids=probe).logits[..., : head.vocab_size].float()
            logits = head.logits(hidden * scale).float().to(expected.device)
        tolerance = PROBE_LOGIT * max(2 * torch.finfo(head.weight.dtype).eps, 1e-5)
        if not torch.allclose(logits, expected, rtol=0, atol=tolerance, equal_nan=True):
            raise InputError(
                f"{self.name} transforms its logits in a way that tsdkd does not support.",
                "Use a model whose head is linear, or linear with a scale and a softcap.",
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
    """A model's output head with its gradients and the weights of its adapters, cut to `vocab` ids."""
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
    """Loads a model, or an adapter with its base model. Raises InputError if transformers cannot load it.

    `dtype`: "auto" is the precision of the saved weights, or float32 on a device without bfloat16 (`auto_dtype`).
    `device_map`: transformers' argument, for a model that exceeds one device; without it the model is on `device`.
    """
    tokenizer, directory = load_tokenizer(name), model_directory(name)
    base = base_model_name(directory)
    device = device or default_device()
    if attention is None and device == "cpu":
        attention = "eager"  # PyTorch's fused attention is slower in bfloat16 on CPUs
    source = model_directory(base) if base else directory
    try:
        if dtype == "auto" and device_map is None:
            dtype = auto_dtype(AutoConfig.from_pretrained(source, trust_remote_code=False), device)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attention,
            device_map=device_map,
            trust_remote_code=False,
        )
        if base:
            model.load_adapter(str(directory))
    except Exception as error:  # transformers, safetensors and peft raise errors of many types
        raise InputError(
            f"{name} is not a causal language model that transformers can load ({first_line(error)}).",
            "Check the directory: it needs config.json, weights and a tokenizer.",
        ) from None
    model.eval()
    if device_map is None:
        model.to(device)
    return LanguageModel(name, model, tokenizer)
