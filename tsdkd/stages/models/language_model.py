"""A causal language model in memory, read as hidden states and an output head."""

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tsdkd.core import Head
from tsdkd.errors import InputError, NotFiniteError
from tsdkd.stages.models.adaptable import base_with_adapters
from tsdkd.stages.models.context import context_length
from tsdkd.stages.models.packed_attention import packed_sequences
from tsdkd.stages.models.packing_check import find_packing_problem
from tsdkd.stages.models.tokenizers import end_token_ids
from tsdkd.stages.models.vocabulary import known_vocab

PROBE_LOGIT = 100.0
"""Exceeds every softcap in use."""


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer, in evaluation mode, on its device."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    shared_vocab: int | None = None
    """The number of ids that the other model of a pair knows; None without another model."""
    pair_end_ids: Collection[int] = ()
    """Ids that end a response besides the model's own: those of a pair, see `pair_end_ids` in `chat`."""

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
        """Ids that end a response; empty for a model without an end token."""
        pair = {i for i in self.pair_end_ids if i < self.vocab}
        return sorted(pair.union(end_token_ids(self.model.generation_config, self.tokenizer, self.vocab)))

    @cached_property
    def vocab(self) -> int:
        """The number of ids that are sampled and compared: the model knows them and, in a pair, the other model too."""
        own = known_vocab(self.name, self.tokenizer, self.model.get_output_embeddings().weight.shape[0])
        return min(own, self.shared_vocab or own)

    @cached_property
    def padding_ids(self) -> list[int]:
        """Rows of the output head that are never sampled."""
        return list(range(self.vocab, self.model.get_output_embeddings().weight.shape[0]))

    @cached_property
    def head(self) -> Head:
        """The output head, without gradients, cut to `vocab` ids.

        The head's logits are compared with the model's own. The comparison scales hidden states until the largest
        logit is `PROBE_LOGIT`, so that a softcap changes it. Raises InputError if the logits differ.
        """
        layer: Any = self.model.get_output_embeddings()
        with align_module_device(layer):  # loads weights that are offloaded from the device
            head = output_head(self.model, self.vocab)
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

    @cached_property
    def packing_problem(self) -> str | None:
        """Why the model cannot read packed batches, as a predicate of its name; None: it can."""
        return find_packing_problem(self.model, decoder_of(self.model).config, self.device, self.hidden)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """As `hidden_states`."""
        return hidden_states(self.model, input_ids, attention_mask, positions)


def share_vocab(student: LanguageModel, teacher: LanguageModel) -> tuple[LanguageModel, LanguageModel]:
    """Both models, cut to the ids that both know."""
    vocab = min(student.vocab, teacher.vocab)
    return replace(student, shared_vocab=vocab), replace(teacher, shared_vocab=vocab)


def hidden_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor | None = None
) -> Tensor:
    """Hidden states after the last norm: ids, mask and positions (batch, seq) -> (batch, seq, width).

    `positions`: by default those of `position_ids`. `attention_mask`: None for a packed batch, one row of sequences,
    whose positions start at 0 in each sequence.
    """
    decoder = decoder_of(model)
    packed: AbstractContextManager[dict[str, Any]] = nullcontext({})
    if attention_mask is None:
        assert positions is not None
        packed = packed_sequences(decoder.config, packed_lengths(positions), input_ids.device)
    elif positions is None:
        positions = position_ids(attention_mask)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
    with packed as arguments:
        hidden: Tensor = decoder(**inputs, use_cache=False, **arguments).last_hidden_state
    return hidden


def packed_lengths(positions: Tensor) -> list[int]:
    """The lengths of the sequences of a packed batch, from its positions (1, tokens)."""
    starts = (positions[0] == 0).nonzero().flatten().tolist()
    return [stop - start for start, stop in pairwise([*starts, positions.shape[1]])]


def decoder_of(model: PreTrainedModel) -> Any:
    """The part of a model that computes hidden states, without its head."""
    whole, embedding = base_with_adapters(model), model.get_input_embeddings()
    decoder: Any = whole.get_decoder()
    # Llama4's text model returns itself there, and ModernBERT's decoder a part of its head.
    if decoder is whole or not _contains(decoder, embedding):
        decoder = next(child for child in whole.children() if _contains(child, embedding))
    return decoder


def _contains(module: nn.Module, part: nn.Module) -> bool:
    return any(other is part for other in module.modules())


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


def not_finite_error(name: str, dtype: torch.dtype | str) -> NotFiniteError:
    """The error for a model whose weights are finite, and whose activations or logits are not."""
    precision = str(dtype).removeprefix("torch.")
    return NotFiniteError(
        f"{name} computes NaN or infinite values in {precision}.",
        "Load it in another precision: --dtype bfloat16 or float32, in train --teacher-dtype."
        if precision == "float16"
        else "Use another checkpoint, or train it again with a lower --learning-rate.",
    )
