"""Tokenizers: loading by a model's name, chat prompts, end tokens, vocabulary size."""

from jinja2 import TemplateError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from tsdkd.errors import InputError, first_line
from tsdkd.stages.models.paths import base_directory, model_directory


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer; an adapter's own, else its base model's. Raises InputError if none can be loaded."""
    directory = model_directory(name)
    if not (directory / "tokenizer_config.json").is_file() and (base := base_directory(directory)):
        return load_tokenizer(str(base))
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    except InputError:
        raise
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception
        raise InputError(
            f"{name} has no tokenizer that transformers can load ({first_line(error)}).", "Save one beside the model."
        ) from None
    return tokenizer


def chat_token_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Ids of a prompt in the model's chat template, up to where the response begins.

    Raises InputError without a chat template, or if the template refuses the messages' roles.
    """
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
            "Give the prompt the roles that this model supports.",
        ) from None
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def end_token_ids(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase, vocab: int) -> list[int]:
    """Ids below `vocab` that end a response: those of the generation config and of the tokenizer; none is no error."""
    configured = generation.eos_token_id if generation else None
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None and 0 <= i < vocab})


def vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's largest id plus one. Rows of a model's head from there on are padding."""
    return int(max(tokenizer.get_vocab().values())) + 1
