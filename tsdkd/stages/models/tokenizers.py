"""Models by name: fingerprint, load; and the few facts about them that stages need."""

from jinja2 import TemplateError
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from tsdkd.errors import InputError
from tsdkd.stages.models.adapters import base_model_name
from tsdkd.stages.models.paths import model_directory


def chat_token_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
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
            f"The chat template refuses a prompt with the roles {roles} ({first_line(error)}).",
            "Give the prompt the roles that this model knows.",
        ) from None
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def end_token_ids(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The generation config's and the tokenizer's end tokens."""
    configured = generation.eos_token_id if generation else None
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None})


def vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One past the tokenizer's last real id; model rows from there on are padding."""
    return int(max(tokenizer.get_vocab().values())) + 1


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Raises InputError when there is none; an adapter without one has its base's."""
    directory = model_directory(name)
    base = base_model_name(directory)
    if base and not (directory / "tokenizer_config.json").is_file():
        return load_tokenizer(base)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    except InputError:
        raise
    except Exception as error:  # a torn tokenizer.json is a bare Exception
        raise InputError(
            f"{name} has no tokenizer that transformers can load ({first_line(error)}).", "Save one beside the model."
        ) from None
    return tokenizer


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
