"""Conversations whose responses are given: read from the files and datasets that hold prompts, with their responses."""

from dataclasses import dataclass
from typing import Any

from tsdkd.errors import InputError
from tsdkd.stages.config.types import Turns
from tsdkd.stages.data.messages import Message, Messages, has_text, is_empty_prompt, located, read_conversation
from tsdkd.stages.data.prompt_files import PromptRow
from tsdkd.stages.data.prompts import Prompt, Prompts

CONVERSATION_COLUMNS = ("messages", "conversations", "prompt")
RESPONSE_COLUMNS = ("response", "completion")
"""The response to a prompt without assistant messages is the first of these columns whose cell is not empty."""
LEARNING_FIELDS = ("weight", "train")
"""Fields of a message that say whether it is learned: 1 or 0, true or false. Templates do not read them."""


@dataclass(frozen=True, slots=True)
class Conversations(Prompts):
    """Distinct conversations in their order, as `Prompts`, whose messages include those of the assistant."""

    response_column: str | None = None
    """The column of the response that follows the messages; None: `RESPONSE_COLUMNS`."""

    @property
    def _prompt_columns(self) -> tuple[str, ...]:
        return (self.column,) if self.column else CONVERSATION_COLUMNS

    @property
    def _response_columns(self) -> tuple[str, ...]:
        return (self.response_column,) if self.response_column else RESPONSE_COLUMNS

    @property
    def _columns(self) -> tuple[str, ...]:
        return (*self._prompt_columns, *self._response_columns, *self._other_columns)

    def _messages(self, row: PromptRow) -> Messages:
        messages = _first_filled(row, self._prompt_columns, "user")
        if messages and (self.response_column or not any(m["role"] == "assistant" for m in messages)):
            messages = messages + _first_filled(row, self._response_columns, "assistant")
        return messages


def learned_messages(conversation: Prompt, turns: Turns) -> list[int]:
    """The indices of the messages that are learned: the assistant's texts, `turns` of them.

    Not learned are tool calls, also those with a text beside them; messages without text; messages whose weight is 0;
    and a message that nothing precedes. Raises InputError for a field of `LEARNING_FIELDS` with another value.
    """
    with located(conversation.location):
        learned = [i for i, message in enumerate(conversation.messages) if i and _is_learned(i, message)]
    return learned if turns == "all" else learned[-1:]


def template_messages(messages: Messages) -> Messages:
    """The messages without `LEARNING_FIELDS`."""
    return [{name: value for name, value in m.items() if name not in LEARNING_FIELDS} for m in messages]


def _first_filled(row: PromptRow, columns: tuple[str, ...], role: str) -> Messages:
    """The messages of the first column whose cell is not empty."""
    column = next((name for name in columns if not is_empty_prompt(name, row.get(name))), columns[0])
    return read_conversation(column, row.get(column), role)


def _is_learned(index: int, message: Message) -> bool:
    if message["role"] != "assistant":
        return False
    values: list[Any] = [message[name] for name in LEARNING_FIELDS if name in message]
    for value in values:
        if not isinstance(value, bool | int | float) or value not in {0, 1}:
            raise InputError(
                f"the weight of message {index + 1} is {value!r}.", "Write 1 for a message that is learned, else 0."
            )
    return all(values) and has_text(message) and not message.get("tool_calls")
