"""Tests which messages a chat template writes, with markers as the messages' texts."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase

from tsdkd.errors import InputError
from tsdkd.stages.models.chat_rendering import render_chat

Messages = list[dict[str, Any]]


def fit_system(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Messages:
    """The messages; leading system messages join the first user message if the chat template refuses or drops them.

    Raises InputError if no user message follows them.
    """
    roles = tuple(message["role"] for message in messages)
    if roles[:1] != ("system",) or _keeps_system(tokenizer, str(tokenizer.chat_template), roles):
        return messages
    return _join_system(messages)


def keeps_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes a system message in front of a user message."""
    return _keeps_system(tokenizer, str(tokenizer.chat_template), ("system", "user"))


def adds_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes a system message of its own in front of a user message alone."""
    markers = _markers(2)
    before_system, marker, rest = _render(tokenizer, ("system", "user"), markers).partition(markers[0])
    between, _, _ = rest.partition(markers[1])
    before_user, _, _ = _render(tokenizer, ("user",), markers[1:]).partition(markers[1])
    own = before_user.removeprefix(before_system)
    # A template without a heading for system messages writes only the user's heading there.
    return bool(marker and before_user.startswith(before_system) and own.strip() and not between.endswith(own))


def require_turns(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> None:
    """Raises InputError if the chat template refuses or drops a message of a conversation with these roles."""
    markers = _markers(len(roles))
    text = _render(tokenizer, roles, markers)
    if not all(marker in text for marker in markers):
        raise InputError(
            f"The chat template refuses or drops messages of a prompt with the roles {', '.join(roles)}.",
            "Correct the tokenizer's chat template, or leave it out with --no-chat.",
        )


def turn_end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The id of the special token that the chat template writes after an assistant's message; empty without one.

    The end token of a base model may differ: its responses would continue with the next turns.
    """
    special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for roles in (("user", "assistant"), ("user", "assistant", "user")):  # some end their last turn with no token
        markers = _markers(len(roles))
        _, marker, rest = _render(tokenizer, roles, markers, continued=False).partition(markers[1])
        found = [text for text in special if marker and rest.lstrip().startswith(text)]
        if found:
            return [special[max(found, key=len)]]
    return []


def pair_end_ids(tokenizer: PreTrainedTokenizerBase, *own: Iterable[int]) -> list[int]:
    """Ids that end a response: the `own` ones of each model of a pair, and the one that ends a turn in the template.

    `tokenizer`: the one whose chat template writes the prompts.
    """
    return sorted({*turn_end_ids(tokenizer), *chain(*own)})


@lru_cache(maxsize=256)
def _keeps_system(tokenizer: PreTrainedTokenizerBase, _template: str, roles: tuple[str, ...]) -> bool:
    """Whether a template writes the leading system messages. Prompts with the same roles share one answer.

    A template may refuse the markers of a whole conversation, because a tool's result needs more than a text: then the
    messages up to the first of the user decide.
    """
    count = _leading_systems(roles)
    for tried in (roles, roles[: count + 1]):
        markers = _markers(len(tried))
        if text := _render(tokenizer, tried, markers):
            return all(marker in text for marker in markers[:count])
    return False


def _leading_systems(roles: Sequence[str]) -> int:
    return next((i for i, role in enumerate(roles) if role != "system"), len(roles))


def _join_system(messages: Messages) -> Messages:
    count = _leading_systems([message["role"] for message in messages])
    systems, rest = messages[:count], messages[count:]
    first = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
    if first is None:
        raise InputError(
            "The chat template refuses or drops system messages, and no user message follows that they could join.",
            "Give the prompt a user message, or leave out the system message.",
        )
    texts = [text for message in systems if (text := _text_of(message["content"]).rstrip())]
    content, instructions = rest[first]["content"] or "", "".join(f"{text}\n\n" for text in texts)
    joined = instructions + content if isinstance(content, str) else [{"type": "text", "text": instructions}, *content]
    return [*rest[:first], rest[first] | {"content": joined}, *rest[first + 1 :]]


def _text_of(content: str | list[dict[str, Any]] | None) -> str:
    """The text of a content, which may be a list of parts of type text."""
    return "".join(part.get("text", "") for part in content) if isinstance(content, list) else content or ""


def _markers(count: int) -> list[str]:
    return [f"message{i:04d}end" for i in range(count)]


def _render(
    tokenizer: PreTrainedTokenizerBase, roles: Sequence[str], markers: list[str], *, continued: bool = True
) -> str:
    """A conversation in the chat template; empty if the template refuses it.

    `continued`: an assistant's message at the end stays open.
    """
    messages = [{"role": role, "content": marker} for role, marker in zip(roles, markers, strict=True)]
    is_open = roles[-1] == "assistant" and continued
    prompted = roles[-1] != "assistant"
    try:
        return render_chat(tokenizer, messages, add_generation_prompt=prompted, continue_final_message=is_open)
    except InputError:
        raise
    except Exception:  # templates raise errors of many types
        return ""
