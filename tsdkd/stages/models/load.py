"""A causal language model in memory: loaded by name, read as hidden states and an output head."""

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from tsdkd.core import Head
from tsdkd.errors import InputError, TsdkdError, first_line
from tsdkd.stages.config.chat import ChatConfig
from tsdkd.stages.config.types import DType, QuantizedBits
from tsdkd.stages.models.adaptable import base_with_adapters
from tsdkd.stages.models.allocator import keep_freed_memory
from tsdkd.stages.models.attention import check_attention
from tsdkd.stages.models.cache import padding_error, require_padding_support
from tsdkd.stages.models.config_files import GENERATION_CONFIG
from tsdkd.stages.models.context import context_length
from tsdkd.stages.models.device import auto_dtype, default_device
from tsdkd.stages.models.packed_attention import packed_sequences
from tsdkd.stages.models.packing_check import find_packing_problem
from tsdkd.stages.models.paths import base_directory, model_directory
from tsdkd.stages.models.quantized import dequantized_tensors, quantization_config, unify_forward
from tsdkd.stages.models.record import require_recorded_base
from tsdkd.stages.models.saved_adapters import attach_adapter
from tsdkd.stages.models.tokenizers import end_token_ids, load_tokenizer
from tsdkd.stages.models.vocabulary import known_vocab
from tsdkd.stages.models.weights import loaded_tensors, record_tying, require_all_tensors, require_finite
from tsdkd.stages.observer import Observer, SilentObserver

hf_logging.disable_progress_bar()
hf_logging.set_verbosity_error()

PROBE_LOGIT = 100.0
"""Exceeds every softcap in use."""
PADDING_TOLERANCE = 0.01
"""Relative change of hidden states by other padding. Masked padding changes nothing but the rounding of 16 bits."""


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


def load_model(
    name: str,
    dtype: DType = "auto",
    device: str | None = None,
    device_map: str | dict[str, str] | None = None,
    attention: str | None = None,
    observer: Observer | None = None,
    chat: ChatConfig | None = None,
    quantize: QuantizedBits | None = None,
) -> LanguageModel:
    """Loads a model, or an adapter with its base model.

    Raises InputError if transformers cannot load it, if its files hold other tensors than its architecture, or values
    that are not finite in `dtype`.

    `dtype`: "auto" is the precision of the saved weights, or float32 on a device without bfloat16 (`auto_dtype`).
    `device_map`: transformers' argument, for a model that exceeds one device; without it the model is on `device`.
    `attention`: of transformers; None is eager on CPUs, else transformers' choice. `observer` receives a warning if
    eager attention replaces that choice, because it computes another attention than the model's. `chat`: as for
    `load_tokenizer`. `quantize`: bits of the linear layers but the head, whose weights cannot be trained then.
    """
    tokenizer, directory = load_tokenizer(name, chat), model_directory(name)
    base = base_directory(directory)
    device = device or default_device()
    if device == "cpu":
        keep_freed_memory()
        attention = attention or "eager"  # PyTorch's fused attention is slower in bfloat16 on CPUs
    try:
        source = str(base or name), base or directory
        model = _read_weights(*source, dtype, device, device_map, attention, quantize)
        if base:
            model = _with_adapter(model, directory, base)
    except InputError:
        raise
    except Exception as error:  # transformers, safetensors and peft raise errors of many types
        raise InputError(
            f"{name} is not a causal language model that transformers can load ({first_line(error)}).",
            "Check the directory: it needs config.json, weights and a tokenizer.",
        ) from None
    record_tying(model)
    model.eval()
    if device_map is None and quantize is None:
        model.to(device)
    require_finite(name, chain(loaded_tensors(model), dequantized_tensors(model)))
    loaded = LanguageModel(name, model, tokenizer)
    try:
        check_attention(name, model, attention, observer or SilentObserver())
        _check_hidden_states(loaded)
    except (TsdkdError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a config that contradicts the weights fails in a forward pass alone
        raise InputError(
            f"{name} cannot compute hidden states ({first_line(error)}).",
            "Check that its config.json belongs to its weights.",
        ) from error
    return loaded


def _read_weights(
    name: str,
    source: Path,
    dtype: DType,
    device: str,
    device_map: str | dict[str, str] | None,
    attention: str | None,
    quantize: QuantizedBits | None,
) -> Any:
    """The model in the directory `source`; `name`: in messages.

    Raises InputError for missing or other tensors, and transformers' errors.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    require_padding_support(name, config)  # before the weights are read
    if dtype == "auto" and device_map is None:
        dtype = auto_dtype(config, device)
    settings: dict[str, Any] = {"device_map": device_map}
    if quantize:
        if getattr(config, "quantization_config", None):
            raise InputError(f"{name} is quantised already.", "Name its full weights, or leave out --quantize.")
        settings["device_map"] = {"": torch.cuda.current_device() if device == "cuda" else device}
        settings["quantization_config"] = quantization_config(quantize, getattr(torch, dtype), config)
    model, report = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        attn_implementation=attention,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        trust_remote_code=False,
        **settings,
    )
    require_all_tensors(name, model, report)
    if quantize:
        unify_forward(model)
    return model


def _with_adapter(model: Any, directory: Path, base: Path) -> Any:
    """The base model with an adapter and the adapter's generation config. Raises as `require_recorded_base`."""
    require_recorded_base(directory, base)
    model = attach_adapter(model, directory).get_base_model()
    if (directory / GENERATION_CONFIG).is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model


def _check_hidden_states(language_model: LanguageModel) -> None:
    """Raises an error if hidden states are not finite, or depend on the ids of padding and so on the batch."""
    tokens, padding = [0, 1, 2, 3], 3
    ids = torch.tensor([[1] * padding + tokens, [2] * padding + tokens], device=language_model.device)
    attention = torch.ones_like(ids)
    attention[:, :padding] = 0
    with torch.no_grad():
        first, second = language_model.hidden(ids, attention)[:, padding:].float()
    if not first.isfinite().all():
        raise not_finite_error(language_model.name, language_model.model.dtype)
    if (first - second).norm() > PADDING_TOLERANCE * first.norm():
        raise padding_error(language_model.name)


def not_finite_error(name: str, dtype: torch.dtype) -> TsdkdError:
    """The error for a model whose weights are finite, and whose activations or logits are not."""
    precision = str(dtype).removeprefix("torch.")
    return TsdkdError(
        f"{name} computes NaN or infinite values in {precision}.",
        "Load it in another precision: --dtype bfloat16 or float32.",
    )
