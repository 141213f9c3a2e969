"""Models by name: fingerprint, load; and the few facts about them that stages need."""

import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import align_module_device
from jinja2 import TemplateError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from tsdkd.artifacts import Model, digest, file_digest
from tsdkd.core import Head
from tsdkd.errors import InputError
from tsdkd.stages.adapters import base_of, settings_of
from tsdkd.stages.config import DType
from tsdkd.stages.places import resolve

hf_logging.disable_progress_bar()
hf_logging.set_verbosity_error()

PROBED_LOGIT = 100.0
"""Beyond every soft-cap in use."""
CONTENT = ("*.safetensors", "*.bin", "config.json", "generation_config.json", "tokenizer.json")
"""Files that decide what a model says."""


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
        return context_of(self.model.config)

    @cached_property
    def end_ids(self) -> list[int]:
        """Ids that end a response."""
        return end_ids_of(self.model.generation_config, self.tokenizer)

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
            head = head_of(self.model, vocab_size(self.tokenizer))
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
        return hidden_of(self.model, input_ids, attention_mask)


def hidden_of(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states after the last norm: ids and mask (batch, seq) -> (batch, seq, width)."""
    body: Any = model.get_decoder()
    output = body(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=positions(attention_mask), use_cache=False
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def head_of(model: PreTrainedModel, vocab: int | None) -> Head:
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


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids that do not depend on padding: (batch, seq) -> (batch, seq)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Ids of a conversation, up to where the model's answer begins. Raises InputError without a chat template."""
    if tokenizer.chat_template is None:
        raise InputError(
            "The model has no chat template.", "Use an instruction-tuned model, or add one to its tokenizer."
        )
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"The chat template refuses a prompt with the roles {roles} ({_first_line(error)}).",
            "Give the prompt the roles that this model knows.",
        ) from None
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def context_of(config: PreTrainedConfig) -> int:
    return int(getattr(config.get_text_config(), "max_position_embeddings", 2**31))


def end_ids_of(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The generation config's and the tokenizer's end tokens."""
    configured = generation.eos_token_id if generation else None
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None})


def vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One past the tokenizer's last real id; model rows from there on are padding."""
    return int(max(tokenizer.get_vocab().values())) + 1


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Raises InputError when there is none; an adapter without one has its base's."""
    directory = resolve(name)
    base = base_of(directory)
    if base and not (directory / "tokenizer_config.json").is_file():
        return load_tokenizer(base)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    except InputError:
        raise
    except Exception as error:  # a torn tokenizer.json is a bare Exception
        raise InputError(
            f"{name} has no tokenizer that transformers can load ({_first_line(error)}).", "Save one beside the model."
        ) from None
    return tokenizer


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
    tokenizer, directory = load_tokenizer(name), resolve(name)
    base = base_of(directory)
    device = device or default_device()
    if attention is None and device == "cpu":
        attention = "eager"  # torch's fused bf16 attention is the slower one there
    source = resolve(base) if base else directory
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
            f"{name} is no causal language model that transformers can load ({_first_line(error)}).",
            "Check the directory: config.json, weights and tokenizer are needed.",
        ) from None
    model.eval()
    if device_map is None:
        model.to(device)
    return LanguageModel(name, model, tokenizer)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def has_bf16(device: str) -> bool:
    """Does the hardware compute in it, or only pretend to?"""
    return torch.cuda.is_bf16_supported() if device == "cuda" else bool(torch.cpu._is_avx512_bf16_supported())


def auto_dtype(config: PreTrainedConfig, device: str) -> DType:
    """A model's saved precision; float32 on CPUs without bf16, which are several times slower in it."""
    saved = str(config.dtype or torch.float32).removeprefix("torch.")
    return "float32" if device == "cpu" and not has_bf16(device) else cast("DType", saved)


def describe(role: str, name: str) -> Model:
    """What a manifest records of a model; the weights are hashed, not loaded. Raises InputError."""
    tokenizer = load_tokenizer(name)
    return Model(
        role=role,
        name=name,
        weights=_weights(name),
        tokenizer=digest(sorted(tokenizer.get_vocab().items())),
        chat_template=hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest(),
    )


def _weights(name: str) -> str:
    """The content of a model, or of an adapter and its base, in one hash."""
    directory = resolve(name)
    files = sorted({file for pattern in CONTENT for file in directory.glob(pattern)})
    if not any(file.suffix in {".safetensors", ".bin"} for file in files):
        raise InputError(f"{name} has no weights.", "Name a directory with model.safetensors (or its shards).")
    content = [[file.name, file_digest(file)] for file in files]
    base = base_of(directory)
    if base is None:
        return digest(content)
    return digest([content, settings_of(directory) | {"base_model_name_or_path": _weights(base)}])


def require_same_tokenizer(one: Model, other: Model) -> None:
    """Raise InputError unless two models map ids to the same tokens."""
    if one.tokenizer != other.tokenizer:
        ours, theirs = (_tokens_by_id(load_tokenizer(model.name)) for model in (one, other))
        unlike = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
        shown = [f"{i} ({ours.get(i)!r} against {theirs.get(i)!r})" for i in unlike[:3]]
        raise InputError(
            f"{one.role} {one.name} ({len(ours)} tokens) and {other.role} {other.name} ({len(theirs)}) have different "
            f"tokenizers: {len(unlike)} ids differ, first {', '.join(shown)}.",
            "Choose two models of one family; TSD-KD compares distributions over the same tokens.",
        )


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {i: token for token, i in tokenizer.get_vocab().items()}


def libraries() -> dict[str, str]:
    """Versions that decide the bytes a stage writes."""
    return {name: version(name) for name in ("torch", "transformers", "tokenizers", "accelerate", "pyarrow")}


def cache_dir() -> Path:
    """Where the embedded models live: TSDKD_CACHE, else the user's cache."""
    root = os.environ.get("TSDKD_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tsdkd"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
