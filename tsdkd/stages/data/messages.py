"""Messages and tools of a row, in the form that chat templates read."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from math import isnan
from typing import Any

from tsdkd.errors import InputError

Message = dict[str, Any]
"""`role` and `content` (text, None or a list of parts), and the fields that a template may know, such as tool_calls."""
Messages = list[Message]
Tools = list[dict[str, Any]]
"""JSON schemas of functions."""
MEDIA = ("image", "audio", "video", "file")
"""Words in the types of parts that hold no text."""

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Roles by the value of `from` in messages with `from` and `value`, the form of ShareGPT."""
EMPTY_JSON = ("[]", "null")


@contextmanager
def located(location: str) -> Iterator[None]:
    """Prefix the cause of an InputError with a location, such as a file and a line."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{location}: {error.cause}", error.remedy) from None


def is_missing(cell: Any) -> bool:
    """Whether a cell is empty: null, NaN, blank text or an empty list."""
    if isinstance(cell, float):
        return isnan(cell)
    return cell is None or cell == [] or (isinstance(cell, str) and not cell.strip())


def is_empty_prompt(column: str, cell: Any) -> bool:
    """Whether a cell holds no prompt. A column named `messages` may hold JSON text."""
    return is_missing(cell) or (column == "messages" and isinstance(cell, str) and cell.strip() in EMPTY_JSON)


def read_messages(column: str, cell: Any) -> Messages:
    """The messages of a cell, without assistant messages at the end; an empty list for an empty prompt.

    Raises InputError as `read_conversation`.
    """
    messages = read_conversation(column, cell)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages if any(_has_content(message) for message in messages) else []


def read_conversation(column: str, cell: Any, role: str = "user") -> Messages:
    """The messages of a cell; an empty list for a cell without content.

    A cell is text, which is one message of `role`; a list of messages, or such a list as JSON text. Raises InputError
    for another cell.
    """
    if is_empty_prompt(column, cell):
        return []
    if isinstance(cell, str):
        cell = _messages_of_text(column, cell, role)
    if not isinstance(cell, list):
        raise InputError(
            f"{column!r} is neither text nor a list of messages with role and content.",
            "Correct the row, or choose another --column.",
        )
    messages = [_message(column, number, message) for number, message in enumerate(cell, 1)]
    return messages if any(_has_content(message) for message in messages) else []


def read_tools(cell: Any) -> Tools | None:
    """The tools of a cell: a list of JSON schemas, or the same as JSON text. Raises InputError for another cell."""
    if is_missing(cell) or cell in EMPTY_JSON:
        return None
    tools = _from_json(cell)
    tools = [_from_json(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError("'tools' is not a list of JSON schemas.", "Correct the row, or rename the column.")
    return tools or None


def prompt_content(messages: Messages, tools: Tools | None) -> Any:
    """The value that identifies a prompt.

    Raises InputError for text and values that a file of JSON in UTF-8 cannot hold.
    """
    content = {"messages": messages, "tools": tools} if tools else messages
    require_encodable(content)
    return content


def require_encodable(value: Any) -> None:
    """Raises InputError for an unpaired surrogate, and for values that JSON cannot represent."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise InputError(f"the text contains the unpaired surrogate \\u{code:04x}.", "Correct the row.") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"the row contains a value that JSON cannot represent ({error}).", "Correct the row."
        ) from None


def text_messages(messages: Messages) -> list[dict[str, str]]:
    """Messages as role and text. The text is the JSON of all other fields for messages with parts or more fields."""
    return [
        message
        if message.keys() == {"role", "content"} and isinstance(message["content"], str)
        else {
            "role": message["role"],
            "content": json.dumps({k: v for k, v in message.items() if k != "role"}, ensure_ascii=False),
        }
        for message in messages
    ]


def has_text(message: Message) -> bool:
    """Whether a message has a content that is not blank."""
    content = message["content"]
    if isinstance(content, list):
        return any(part["type"] == "text" and part["text"].strip() for part in content)
    return bool((content or "").strip())


def _messages_of_text(column: str, text: str, role: str) -> Any:
    """The list that JSON text holds, if it looks like messages; else one message of `role`.

    Raises InputError if a column that is named `messages` holds other structured text.
    """
    cell = _from_json(text)
    if isinstance(cell, list) and cell and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in cell):
        return cell
    if column == "messages" and text.lstrip().startswith(("[", "{")):
        raise InputError(
            "'messages' is text, but not the JSON of a list of messages with role and content.",
            "Write it with json.dumps, or choose another --column.",
        )
    return [{"role": role, "content": text}]


def _from_json(cell: Any) -> Any:
    """The value of JSON text; another cell as it is."""
    if not isinstance(cell, str) or not cell.lstrip().startswith(("[", "{")):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


def _message(column: str, number: int, message: Any) -> Message:
    """A checked message without its null fields; a null content stays. Raises InputError."""
    if isinstance(message, dict) and "role" not in message and "from" in message:
        message = _from_sharegpt(column, number, message)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or len(message) < 2:
        raise InputError(
            f"{column!r} is neither text nor a list of messages with role and content (message {number}).",
            "Correct the row, or choose another --column.",
        )
    content = message.get("content")
    if not (content is None or isinstance(content, str | list)):
        raise InputError(
            f"the content of message {number} of {column!r} is {type(content).__name__}, not text or a list of parts.",
            "Correct the row.",
        )
    for part in content if isinstance(content, list) else []:
        _require_text_part(number, part)
    kept = {name: value for name, value in message.items() if value is not None or name == "content"}
    return kept if "content" in kept else kept | {"content": None}


def _from_sharegpt(column: str, number: int, message: dict[str, Any]) -> dict[str, Any]:
    """A message with `from` and `value` as one with role and content. Raises InputError for an unknown `from`."""
    rest = {name: value for name, value in message.items() if name not in {"from", "value"}}
    role = SHAREGPT_ROLES.get(str(message["from"]))
    if role is None:
        raise InputError(
            f"message {number} of {column!r} is from {message['from']!r}.",
            f"Known are {', '.join(SHAREGPT_ROLES)}; write other messages with role and content.",
        )
    return {"role": role, "content": message.get("value")} | rest


def _require_text_part(number: int, part: Any) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise InputError(f"message {number} has a part without a type.", 'Write {"type": "text", "text": ...}.')
    if any(word in kind for word in MEDIA):
        raise InputError(f"message {number} has a part of type {kind}; models read text.", "Leave out the row.")
    if kind == "text" and not isinstance(part.get("text"), str):
        raise InputError(f"message {number} has a part of type text without a text.", "Correct the row.")


def _has_content(message: Message) -> bool:
    content, rest = message["content"], message.keys() - {"role", "content"}
    if isinstance(content, list):
        return any(part["type"] != "text" or part["text"].strip() for part in content) or bool(rest)
    return bool((content or "").strip()) or bool(rest)
