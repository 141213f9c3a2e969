"""The token ids of given responses: where each assistant turn begins and ends in a conversation.

A template with generation markers says it; what it marks after the end token is left out. With any other template,
the ids of the messages before a turn, up to where the response begins, and those of the messages with the turn must
agree with the ids of the whole conversation. Where a template writes earlier turns in another way than the last one, as
templates that remove thoughts do, each turn becomes a response of its own.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from tsdkd.errors import InputError
from tsdkd.stages.config.types import Turns
from tsdkd.stages.data.conversations import learned_messages, template_messages
from tsdkd.stages.data.messages import Message, Messages, Tools, located
from tsdkd.stages.data.prompts import Prompt
from tsdkd.stages.data.thoughts import message_texts
from tsdkd.stages.data.turns import response_turns
from tsdkd.stages.models.chat import fit_system
from tsdkd.stages.models.chat_rendering import has_generation_markers
from tsdkd.stages.models.tokenizers import ConversationWriter


@dataclass(frozen=True, slots=True)
class GivenTurn:
    """An assistant's message as token ids."""

    message: int
    """The index of the message."""
    start: int
    """The number of tokens before it."""
    stop: int
    """The number of tokens up to its end, with the end token, without what the template writes after it."""
    has_end: bool
    """Whether the template writes an end token."""


@dataclass(frozen=True, slots=True)
class GivenResponse:
    """A prompt with one response, whose mask marks the turns that are learned."""

    messages: Messages
    """Of the prompt."""
    prompt_ids: list[int]
    response_ids: list[int]
    mask: list[bool]
    has_end: bool
    """Whether the last turn has its end token: the template writes one, and the limit does not cut it."""


@dataclass(frozen=True, slots=True)
class GivenConversation:
    """The responses of one conversation, and what is left out of it."""

    responses: list[GivenResponse]
    skipped_turns: Counter[str]
    """By reason: "limit", "too_long", "unaligned"."""
    is_split: bool = False
    """Whether each turn is a response of its own, because the template writes earlier turns in another way."""


@dataclass(frozen=True, slots=True)
class ResponseFinder:
    """Finds the responses of conversations within limits of tokens."""

    writer: ConversationWriter
    end_ids: Collection[int]
    turns: Turns
    max_prompt_tokens: int
    max_new_tokens: int

    def find(self, conversation: Prompt) -> GivenConversation:
        """The responses of a conversation; none if it has no turn to learn, or only turns beyond the limits.

        Raises InputError where the template refuses or ignores a message, or writes a turn in another way than it
        prompts for it.
        """
        messages = template_messages(conversation.messages)
        learned = learned_messages(conversation, self.turns)
        if not learned:
            return GivenConversation([], Counter())
        messages, tools = messages[: learned[-1] + 1], conversation.tools
        with located(conversation.location):
            fitted = fit_system(self.writer.tokenizer, messages)
            learned = [i - len(messages) + len(fitted) for i in learned]
            messages = fitted
            text = self.writer.conversation(messages, tools)
            self.writer.require_complete(text, messages, tools)
            marked = self._find_marked(messages, tools, learned, text)
            return marked or self._find_by_prefixes(messages, tools, learned, text)

    @property
    def _longest(self) -> int:
        return self.max_prompt_tokens + self.max_new_tokens

    def _find_marked(
        self, messages: Messages, tools: Tools | None, learned: list[int], whole_text: str
    ) -> GivenConversation | None:
        """By the template's markers; None unless they mark one piece of the text for each assistant message."""
        tokenizer: Any = self.writer.tokenizer
        if not (tokenizer.is_fast and has_generation_markers(tokenizer.get_chat_template(None, tools))):
            return None
        is_whole = all(_writes(whole_text, messages[i]) for i in learned)
        groups = [learned] if is_whole else [[i] for i in learned]
        skipped, responses = Counter[str](), list[GivenResponse]()
        for group in groups:
            through = messages[: group[-1] + 1]
            if not is_whole:
                _require_written(self.writer.conversation(through, tools), through)
            found = self._marked_turns(through, tools, group)
            if found is None:
                return None
            responses += self._join(through, *found, skipped)
        return GivenConversation(responses, skipped, is_split=len(groups) > 1)

    def _marked_turns(
        self, messages: Messages, tools: Tools | None, learned: list[int]
    ) -> tuple[list[int], list[GivenTurn]] | None:
        """The ids of the messages, and their turns."""
        ids, mask = self.writer.marked(messages, tools)
        pieces = response_turns(len(ids), mask)
        by_assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(pieces) != len(by_assistant):
            return None
        turns = []
        for i, piece in zip(by_assistant, pieces, strict=True):
            if i in learned:
                end, has_end = self._turn_end(ids[: piece.stop], piece.start)
                turns.append(GivenTurn(i, piece.start, end if has_end else piece.stop, has_end))
        return ids, turns

    def _find_by_prefixes(
        self, messages: Messages, tools: Tools | None, learned: list[int], whole_text: str
    ) -> GivenConversation:
        skipped = Counter[str]()
        prompts = [self.writer.prompt(messages[:i], tools) for i in learned]
        texts = [*(self.writer.conversation(messages[: i + 1], tools) for i in learned[:-1]), whole_text]
        for i, prompt, text in zip(learned, prompts, texts, strict=True):
            if not text.startswith(prompt):
                raise InputError(
                    f"The chat template writes message {i + 1}, an assistant's, in another way than it prompts for it.",
                    "Use a chat template whose text of a conversation continues the prompt, or leave out the row.",
                )
            _require_written(text[len(prompt) :], messages[: i + 1])
        ids = self.writer.ids([*prompts, *texts], self._longest)
        whole, turns = ids[-1], list[tuple[list[int], GivenTurn]]()
        for i, prompt_ids, through in zip(learned, ids[: len(learned)], ids[len(learned) :], strict=True):
            start = len(prompt_ids)
            end, has_end = self._turn_end(through, start)
            if start > self._longest:  # both are cut
                turns.append((prompt_ids, GivenTurn(i, start, start + 1, has_end=False)))
            elif through[:start] != prompt_ids or end <= start:  # a token holds the end of the prompt and the beginning
                skipped["unaligned"] += 1
            else:
                turns.append((through[:end], GivenTurn(i, start, end, has_end)))
        if all(through == whole[: len(through)] for through, _ in turns):
            return GivenConversation(self._join(messages, whole, [turn for _, turn in turns], skipped), skipped)
        responses = [r for through, turn in turns for r in self._join(messages, through, [turn], skipped)]
        return GivenConversation(responses, skipped, is_split=True)

    def _join(
        self, messages: Messages, ids: list[int], turns: list[GivenTurn], skipped: Counter[str]
    ) -> list[GivenResponse]:
        """The response that holds these turns, up to the limits; empty if the prompt is too long."""
        turns = [turn for turn in turns if turn.start]
        if not turns:
            return []
        first = turns[0].start
        if first > self.max_prompt_tokens:
            skipped["too_long"] += len(turns)
            return []
        limit = first + self.max_new_tokens
        kept = [turn for turn in turns if turn.start < limit]
        skipped["limit"] += len(turns) - len(kept)
        last = kept[-1]
        end = min(last.stop, limit)
        mask = [any(turn.start <= i < turn.stop for turn in kept) for i in range(first, end)]
        has_end = last.has_end and end == last.stop
        return [GivenResponse(messages[: turns[0].message], ids[:first], ids[first:end], mask, has_end)]

    def _turn_end(self, ids: list[int], start: int) -> tuple[int, bool]:
        """Where a turn that begins at `start` and is followed by nothing else ends, and whether it has an end token.

        After the text, a template writes an end token, and maybe line breaks and further special tokens.
        """
        stop = len(ids)
        while stop > start and self._follows_text(ids[stop - 1]):
            stop -= 1
        end = next((i + 1 for i in range(stop, len(ids)) if ids[i] in self.end_ids), None)
        return (end or stop, end is not None) if stop > start else (start, False)

    def _follows_text(self, token: int) -> bool:
        """Whether a token is an end token, another special token or white space."""
        if token in self.end_ids or token in self.writer.special_ids:
            return True
        return not self.writer.tokenizer.decode([token]).strip()


def _writes(text: str, message: Message) -> bool:
    """Whether a text holds all thoughts and answers of a message, whatever the white space."""
    squeezed = "".join(text.split())
    return all("".join(part.split()) in squeezed for part in message_texts(message))


def _require_written(text: str, messages: Messages) -> None:
    """Raises InputError if the rendered `text` of the messages leaves out a thought or an answer of the last one."""
    if not _writes(text, messages[-1]):
        raise InputError(
            f"The chat template leaves out a thought or a text of message {len(messages)}, an assistant's.",
            "Use a model or a --chat-template that writes it, or remove it from the row.",
        )
