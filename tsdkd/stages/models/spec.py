"""Properties of a model that its config files state, before its weights are loaded."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from tsdkd.stages.config.chat import ChatConfig
from tsdkd.stages.config.types import DType
from tsdkd.stages.models.adapters import ADAPTER_CONFIG
from tsdkd.stages.models.cache import can_roll_back, require_padding_support
from tsdkd.stages.models.config_files import GENERATION_CONFIG, require_dropouts, translate_config_errors
from tsdkd.stages.models.context import context_length
from tsdkd.stages.models.device import auto_dtype, default_device
from tsdkd.stages.models.paths import base_directory, model_directory
from tsdkd.stages.models.tokenizers import end_token_ids, load_tokenizer
from tsdkd.stages.models.vocabulary import known_vocab


@dataclass(frozen=True)
class ModelSpec:
    """A model, or a LoRA adapter with its base model."""

    name: str
    directory: Path
    """The model's directory; the base model's for an adapter."""
    adapter: Path | None
    """The adapter's directory."""
    tokenizer: PreTrainedTokenizerBase
    context: int
    """The longest sequence that the model reads, in tokens."""
    vocab: int
    """The number of ids that the model knows."""
    end_ids: list[int]
    """Ids that end a response; empty for a model without an end token."""
    can_roll_back: bool
    """Whether tokens can be removed from the model's cache."""
    dtype: str
    """The precision that "auto" stands for, such as bfloat16."""

    def resolve_dtype(self, dtype: DType) -> str:
        """The precision to load: vLLM's own "auto" would turn float32 into float16."""
        return self.dtype if dtype == "auto" else dtype


def load_spec(name: str, chat: ChatConfig | None = None) -> ModelSpec:
    """Raises InputError for a missing model, an unreadable config and an unsupported architecture.

    `chat`: as for `load_tokenizer`.
    """
    named, tokenizer = model_directory(name), load_tokenizer(name, chat)
    base = base_directory(named)
    directory = base or named
    with translate_config_errors(name):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        configured = next((d for d in (named, directory) if (d / GENERATION_CONFIG).is_file()), None)
        if configured:
            generation = GenerationConfig.from_pretrained(configured)
        else:
            generation = GenerationConfig.from_model_config(config)
        require_padding_support(name, config)
        require_dropouts(name, config)
        vocab = known_vocab(name, tokenizer, config.get_text_config().vocab_size)
        return ModelSpec(
            name=name,
            directory=directory,
            adapter=named if base else None,
            tokenizer=tokenizer,
            context=context_length(config),
            vocab=vocab,
            end_ids=end_token_ids(generation, tokenizer, vocab),
            can_roll_back=can_roll_back(config),
            dtype=auto_dtype(config, default_device()),
        )


def load_config(name: str) -> PreTrainedConfig:
    """A model's config; the base model's for an adapter. Downloads no other file from the hub. Raises InputError."""
    directory = model_directory(name, ("config.json", ADAPTER_CONFIG))
    directory = base_directory(directory, ("config.json",)) or directory
    with translate_config_errors(name):
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
