"""Tokenizers: loading by a model's name, chat prompts, end tokens, vocabulary size."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from functools import lru_cache
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from tsdkd.errors import InputError, first_line
from tsdkd.stages.config.chat import ChatConfig
from tsdkd.stages.models.chat_format import set_chat_format
from tsdkd.stages.models.chat_rendering import marked_token_ids, render_chat, require_compilable
from tsdkd.stages.models.config_files import require_readable_config
from tsdkd.stages.models.custom_code import custom_code_error
from tsdkd.stages.models.paths import base_directory, model_directory

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]


def load_tokenizer(name: str, chat: ChatConfig | None = None) -> PreTrainedTokenizerBase:
    """A model's tokenizer; an adapter's own, else its base model's; with the chat format `chat`.

    Raises InputError if none can be loaded, and as `set_chat_format`.
    """
    directory = model_directory(name)
    if not (directory / "tokenizer_config.json").is_file() and (base := base_directory(directory)):
        return load_tokenizer(str(base), chat)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception
        if "trust_remote_code" in str(error):
            raise custom_code_error(name, "its tokenizer") from None
        require_readable_config(name, directory)
        raise InputError(
            f"{name} has no tokenizer that transformers can load ({first_line(error)}).", "Save one beside the model."
        ) from None
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # transformers makes one without any file
        raise InputError(f"{name} has no tokenizer: its vocabulary is empty.", "Save one beside the model.")
    if chat:
        set_chat_format(tokenizer, chat)
    return tokenizer


def chat_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    tools: Tools | None = None,
    day: str | None = None,
    max_tokens: int | None = None,
) -> list[int]:
    """Ids of a prompt in the model's chat template, up to where the response begins.

    `messages` and `tools`: as transformers' `apply_chat_template` takes them; `day`: as for `day_arguments`. Of a text
    that is too long for `max_tokens`, it returns the first ids only: at least `max_tokens` + 1.

    Raises InputError if the template refuses the prompt, ignores its tools or tool calls, or writes Python's None or
    the repr of a list in place of a content.
    """
    require_chat_template(tokenizer)
    text = _render(tokenizer, messages, tools, day)
    _require_complete(tokenizer, text, messages, tools, day)
    if max_tokens is not None:
        start = text[: (max_tokens + 1) * _longest_token(tokenizer)]
        ids = list(tokenizer(start, add_special_tokens=False).input_ids)
        if len(start) == len(text) or len(ids) > max_tokens:
            return ids
    return list(tokenizer(text, add_special_tokens=False).input_ids)


class ConversationWriter:
    """Writes conversations in a model's chat template, and their token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, day: str | None) -> None:
        """`day`: as for `day_arguments`. Raises InputError without a valid chat template."""
        require_chat_template(tokenizer)
        self.tokenizer = tokenizer
        self.special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._day = day

    def prompt(self, messages: Messages, tools: Tools | None) -> str:
        """The text that a model reads before it responds to the messages."""
        return _render(self.tokenizer, messages, tools, self._day)

    def conversation(self, messages: Messages, tools: Tools | None) -> str:
        """The text of messages that end with a response, including what the template writes after the response."""
        return _render(self.tokenizer, messages, tools, self._day, prompted=False)

    def require_complete(self, text: str, messages: Messages, tools: Tools | None) -> None:
        """Raises InputError if `text`, from `conversation`, leaves out a part of the messages; `chat_token_ids` checks
        the same.
        """
        _require_complete(self.tokenizer, text, messages, tools, self._day, prompted=False)
        try:
            is_ignored = text == self.conversation([*messages[:-1], messages[-1] | {"content": ""}], tools)
        except InputError:
            return
        if is_ignored:
            raise InputError(
                "The chat template ignores the text of the last response.", "Use a model whose template writes it."
            )

    def marked(self, messages: Messages, tools: Tools | None) -> tuple[list[int], list[bool]]:
        """The ids of `conversation`, and the mask of those between the template's generation markers."""
        return marked_token_ids(self.tokenizer, messages, tools=tools, **day_arguments(self._day))

    def ids(self, texts: list[str], max_tokens: int) -> list[list[int]]:
        """The ids of texts; of a text that is too long for `max_tokens`, the first ones: at least `max_tokens` + 1."""
        start = (max_tokens + 1) * _longest_token(self.tokenizer)
        ids: list[list[int]] = self.tokenizer([text[:start] for text in texts], add_special_tokens=False).input_ids
        return ids


@lru_cache(maxsize=8)
def _longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """An upper bound of the characters of one token's text; vocabularies write bytes or characters."""
    return max(map(len, tokenizer.get_vocab()))


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError without a chat template, for several without a default, and for an invalid one."""
    templates = tokenizer.chat_template
    if templates is None:
        raise InputError(
            "The model has no chat template.",
            "Use an instruction-tuned model, or give generate, train, eval or doctor --chat-template plain (a format "
            "for base models) or FILE.",
        )
    if isinstance(templates, dict) and "default" not in templates:
        raise InputError(
            f"The model has several chat templates, and none is the default: {', '.join(sorted(templates))}.",
            "Save one of them in its tokenizer under the name `default`.",
        )
    require_compilable(templates["default"] if isinstance(templates, dict) else templates)


def writes_day(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template writes the day on which it is applied."""
    return "strftime_now" in str(tokenizer.chat_template)


def day_arguments(day: str | None) -> dict[str, Any]:
    """Arguments of `apply_chat_template` that fix the day, such as 2026-11-27, at midnight; None: the current time."""
    return {"strftime_now": datetime.fromisoformat(day).strftime} if day else {}


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    tools: Tools | None,
    day: str | None,
    prompted: bool = True,
) -> str:
    try:
        with _same_draws() if _draws_words(tokenizer) else nullcontext():
            return render_chat(tokenizer, messages, tools=tools, add_generation_prompt=prompted, **day_arguments(day))
    except InputError:
        raise
    except Exception as error:  # a template is a program
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"The chat template refuses a prompt with the roles {roles} ({first_line(error)}).",
            "Give the prompt the roles and fields that this model supports.",
        ) from None


def _draws_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template may use jinja's random functions."""
    template = str(tokenizer.chat_template)
    return "random" in template or "lipsum" in template


@contextmanager
def _same_draws() -> Iterator[None]:
    """Seeds the global random state inside the context, and restores it afterwards."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


def _require_complete(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    messages: Messages,
    tools: Tools | None,
    day: str | None,
    prompted: bool = True,
) -> None:
    """Raises InputError if the template ignores a part of the prompt, or writes None or a list as Python does.

    A template ignores a part if it writes the same text without that part.
    """

    def render(messages: Messages, tools: Tools | None) -> str:
        try:
            return _render(tokenizer, messages, tools, day, prompted)
        except InputError:
            return ""

    for part, variant in _without_each_part(messages, tools).items():
        if render(*variant) == text:
            raise InputError(
                f"The chat template ignores {part}.", "Leave them out, or use a model whose template writes them."
            )
    contents = [message["content"] for message in messages]
    if any(str(content) in text for content in contents if content and isinstance(content, list)):
        raise InputError(
            "The chat template does not support contents that are lists of parts.", "Write each content as text."
        )
    empty = [message | {"content": message["content"] or ""} for message in messages]
    if None in contents and text.count("None") > render(empty, tools).count("None"):
        raise InputError("The chat template writes a null content as None.", "Write a text, or leave out the row.")


def _without_each_part(messages: Messages, tools: Tools | None) -> dict[str, tuple[Messages, Tools | None]]:
    """A prompt without each of its parts that some templates ignore, by the name of the part."""
    variants: dict[str, tuple[Messages, Tools | None]] = {}
    if tools:
        variants["tools"] = messages, None
    if any(message.get("tool_calls") for message in messages):
        variants["tool calls"] = [{k: v for k, v in m.items() if k != "tool_calls"} for m in messages], tools
    if any(message["content"] and isinstance(message["content"], list) for message in messages):
        texts = [m | {"content": ""} if isinstance(m["content"], list) else m for m in messages]
        variants["contents that are lists of parts"] = texts, tools
    for role in {m["role"] for m in messages if m["content"]} - {"user", "assistant"}:
        variants[f"messages of the role {role}"] = (
            [m | {"content": ""} if m["role"] == role else m for m in messages],
            tools,
        )
    return variants


def end_token_ids(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase, vocab: int) -> list[int]:
    """Ids below `vocab` that end a response: those of the generation config and of the tokenizer; may be empty.

    Raises InputError if the generation config holds something other than ids.
    """
    configured = generation.eos_token_id if generation else None
    ids = configured if isinstance(configured, list) else [configured]
    if not all(i is None or type(i) is int for i in ids):
        raise InputError(
            f"The eos_token_id of generation_config.json or config.json is {configured!r}, not a token id.",
            "Write a number there, or a list of numbers.",
        )
    return sorted({int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None and 0 <= i < vocab})


def vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's largest id plus one. Rows of a model's head from there on are padding."""
    return int(max(tokenizer.get_vocab().values())) + 1
