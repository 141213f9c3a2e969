"""Configuration of the chat format: the template that writes prompts, and the keywords that it reads."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from tsdkd.errors import InputError
from tsdkd.stages.config.groups import CHAT
from tsdkd.stages.config.option import Option, option, reuse

PLAIN = "plain"
"""The word for the plain chat format."""
TEMPLATE_PARENT = "chat-template"
"""The kind of the parent that is a chat template's file; also the option's name."""
RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "strftime_now"}
"""Keywords that every prompt sets, so that a default would have no effect."""
_EXAMPLE = """Give an object, such as '{"enable_thinking": false}'."""


@dataclass(frozen=True)
class ChatConfig:
    """How messages become a prompt; unset: by the model's own chat template."""

    template: str | None = option(
        None,
        "Chat template: a jinja file, or plain, a format for base models.",
        group=CHAT,
        name="chat-template",
        metavar="FILE",
        shown="the model's own",
    )
    kwargs: str | None = option(
        None,
        """Keywords that the chat template reads, such as '{"enable_thinking": false}'.""",
        group=CHAT,
        name="chat-template-kwargs",
        metavar="JSON",
        shown="none",
    )
    """A JSON object, stored with sorted names."""

    def __post_init__(self) -> None:
        if self.kwargs is not None:
            keywords = _read_keywords(self.kwargs)
            object.__setattr__(self, "kwargs", json.dumps(keywords, sort_keys=True) if keywords else None)

    @property
    def keywords(self) -> dict[str, Any]:
        """The keywords with their values."""
        return dict(json.loads(self.kwargs)) if self.kwargs else {}

    @property
    def is_set(self) -> bool:
        return bool(self.template or self.kwargs)

    @property
    def file(self) -> str | None:
        """The template's file, if it is one."""
        return None if self.template == PLAIN else self.template


def recorded_chat_options(*, without_rollouts: bool = False) -> dict[str, Option]:
    """The options of a stage that takes the format of its rollouts; `without_rollouts`: it may have none."""
    shown = {"template": "as recorded", "kwargs": "as recorded"}
    if without_rollouts:
        shown = {"template": "as recorded, else the model's own", "kwargs": "as recorded, else none"}
    return reuse(ChatConfig, tuple(shown), CHAT, **{name: {"shown": words} for name, words in shown.items()})


def _read_keywords(text: str) -> dict[str, Any]:
    """Raises InputError unless the text is a JSON object of keywords that a template can read."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        keywords = json.loads(text, parse_constant=refuse)
        json.dumps(keywords, allow_nan=False, ensure_ascii=False).encode()  # 1e999, half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise InputError(f"--chat-template-kwargs is not JSON ({error}).", _EXAMPLE) from None
    if not isinstance(keywords, dict):
        raise InputError(f"--chat-template-kwargs is {text[:60]}, not a JSON object.", _EXAMPLE)
    for name in keywords:
        if not (name.isascii() and name.isidentifier()):
            raise InputError(f"--chat-template-kwargs has the keyword {name!r}.", "Name a variable of the template.")
        if name in RESERVED:
            raise InputError(f"--chat-template-kwargs has the keyword {name}.", "Leave it out: each prompt sets it.")
        value = keywords[name]
        if isinstance(value, str) and value.lower() in {"true", "false"}:  # templates ask `is false`, which no text is
            raise InputError(
                f"--chat-template-kwargs has the text {json.dumps(value)} for {name}.",
                f"Write {value.lower()} without quotes.",
            )
    return keywords


def recorded_config(config: Any) -> dict[str, Any]:
    """A configuration as a manifest records it: an unset chat format is left out, and a template's file is a parent."""
    return _without_unset_chat(asdict(config))


def _without_unset_chat(values: dict[str, Any]) -> dict[str, Any]:
    recorded: dict[str, Any] = {}
    for name, value in values.items():
        if name == "chat":
            template = PLAIN if value["template"] == PLAIN else None
            if template or value["kwargs"]:
                recorded[name] = {"template": template, "kwargs": value["kwargs"]}
        else:
            recorded[name] = _without_unset_chat(value) if isinstance(value, dict) else value
    return recorded
