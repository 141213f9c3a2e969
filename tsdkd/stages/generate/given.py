"""generate --policy given: conversations with assistant turns -> rollouts, without an engine.

The content of a part depends on its conversations alone, so that an interrupted run ends with the bytes of an
uninterrupted one. One part is in memory at a time.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from tsdkd.artifacts.hashing import json_digest
from tsdkd.artifacts.manifest import Manifest
from tsdkd.artifacts.reader import Artifact
from tsdkd.artifacts.schemas import schema_of
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GIVEN, GenerateConfig, recorded_sampling
from tsdkd.stages.data.conversations import Conversations
from tsdkd.stages.data.given_responses import GivenConversation, GivenResponse, ResponseFinder
from tsdkd.stages.data.messages import prompt_content, text_messages
from tsdkd.stages.data.prompts import Prompt
from tsdkd.stages.data.recorded_chat import add_template, template_parents
from tsdkd.stages.data.turns import response_turns
from tsdkd.stages.models.chat import pair_end_ids
from tsdkd.stages.models.context import require_context
from tsdkd.stages.models.record import chat_day, library_versions, model_record
from tsdkd.stages.models.spec import load_spec
from tsdkd.stages.models.tokenizers import ConversationWriter
from tsdkd.stages.models.vocabulary import require_known_ids
from tsdkd.stages.observer import Observer

CONVERSATIONS_PER_PART = 2048
SKIPPED = {
    "empty": "empty",
    "duplicate": "duplicate",
    "no_turn": "without a text of the assistant to learn",
    "too_long": "with a prompt of more than {max_prompt_tokens} tokens",
    "unaligned": "whose turns begin within a token",
}
SKIPPED_TURNS = {
    "limit": "after {max_new_tokens} tokens",
    "too_long": "after a prompt of more than {max_prompt_tokens} tokens",
    "unaligned": "that begin within a token",
}
"""Reasons for which conversations, and turns of others, are left out, in words."""


@dataclass(slots=True)
class GivenCounts:
    """Conversations that a first pass counted."""

    conversations: int = 0
    """Those with a response."""
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_turns: Counter[str] = field(default_factory=Counter)
    """Of the conversations with a response."""
    split: int = 0
    """Conversations whose turns are responses of their own."""
    responses: int = 0
    turns: int = 0
    response_tokens: int = 0
    """Tokens that are learned."""
    context_tokens: int = 0
    """Other tokens of the responses."""
    truncated: int = 0
    longest: int = 0
    """Tokens of the longest prompt with its response."""
    largest_id: int = 0

    def add(self, found: GivenConversation) -> None:
        if not found.responses:
            self.skipped[next((reason for reason, count in found.skipped_turns.items() if count), "no_turn")] += 1
            return
        self.conversations += 1
        self.split += found.is_split
        self.skipped_turns.update(found.skipped_turns)
        for response in found.responses:
            learned = sum(response.mask)
            self.responses += 1
            self.turns += len(response_turns(len(response.mask), response.mask))
            self.response_tokens += learned
            self.context_tokens += len(response.mask) - learned
            self.truncated += not response.has_end
            self.longest = max(self.longest, len(response.prompt_ids) + len(response.response_ids))
            self.largest_id = max(self.largest_id, *response.prompt_ids, *response.response_ids)

    def summary(self) -> dict[str, Any]:
        return {
            "prompts": self.conversations,
            "prompts_skipped": _without_zeros(self.skipped),
            "responses": self.responses,
            "turns": self.turns,
            "turns_skipped": _without_zeros(self.skipped_turns),
            "split_conversations": self.split,
            "response_tokens": self.response_tokens,
            "context_tokens": self.context_tokens,
            "teacher_tokens": 0,
            "truncated": self.truncated,
        }


def record_given(
    prompts: Path, student: str, output: Path, config: GenerateConfig, seed: int, observer: Observer, overwrite: bool
) -> Artifact:
    """Write given responses as rollouts. Raises InputError before anything is written."""
    part_size = config.part_size or CONVERSATIONS_PER_PART
    config = replace(config, part_size=part_size)
    record, spec = model_record("student", student, chat=config.chat), load_spec(student, config.chat)
    source = Conversations(
        *(prompts, config.column, config.limit, config.system, config.config_name, config.split, config.teacher_by),
        response_column=config.response_column,
    )
    manifest = Manifest(
        kind="rollouts",
        config=recorded_sampling(config),
        seed=seed,
        parents=(source.parent(output), *template_parents(config.chat, output)),
        models=(record,),
        libraries=library_versions(),
    )
    manifest = replace(manifest, day=chat_day(spec.tokenizer, output, manifest, overwrite))
    ends = pair_end_ids(spec.tokenizer, spec.end_ids)
    conversations = ConversationWriter(spec.tokenizer, manifest.day)
    finder = ResponseFinder(conversations, ends, config.turns, config.max_prompt_tokens, config.max_new_tokens)
    counts = _count(source, finder)
    if not counts.responses:
        reasons = format_counts(counts.skipped, SKIPPED, config)
        raise InputError(
            f"Every conversation of {prompts} is skipped: {reasons}.",
            "Name the columns with --column and --response-column, raise --max-prompt-tokens, or correct the rows.",
        )
    require_context([spec], counts.longest)
    require_known_ids(spec.name, spec.vocab, counts.largest_id)
    with Writer.open(output, manifest, overwrite=overwrite) as writer, observer.writing(writer.path):
        if writer.complete:
            observer.info(f"{output} is complete: nothing to do.")
            return writer.artifact
        add_template(writer, config.chat)
        _report(counts, config, observer)
        with observer.progress("responses recorded", counts.responses, "responses", writer.manifest.rows) as advance:
            _write_parts(source, finder, part_size, spec.tokenizer, writer, advance)
        return writer.finish(counts.summary(), observer.info)


def format_counts(counts: dict[str, int], reasons: dict[str, str], config: GenerateConfig) -> str:
    """Counts by reason, in words."""
    limits = {"max_prompt_tokens": config.max_prompt_tokens, "max_new_tokens": config.max_new_tokens}
    words = [f"{counts[name]:,} {text.format(**limits)}" for name, text in reasons.items() if counts.get(name)]
    return ", ".join(words) or "none"


def _count(source: Conversations, finder: ResponseFinder) -> GivenCounts:
    counts = GivenCounts()
    for conversation in source.read(counts.skipped):
        counts.add(finder.find(conversation))
    return counts


def _report(counts: GivenCounts, config: GenerateConfig, observer: Observer) -> None:
    """Warn of skipped conversations and turns, of split conversations, and of responses without an end token."""
    if counts.skipped:
        observer.warning(f"Conversations skipped: {format_counts(counts.skipped, SKIPPED, config)}.")
    if any(counts.skipped_turns.values()):
        observer.warning(f"Turns skipped: {format_counts(counts.skipped_turns, SKIPPED_TURNS, config)}.")
    if counts.split:
        observer.warning(
            f"{counts.split:,} conversations are split into a response for each turn: the chat template writes earlier "
            "turns in another way than the last one."
        )
    if counts.truncated:
        observer.warning(
            f"{counts.truncated:,} responses have no end token: --max-new-tokens cuts them, or the template has none."
        )


def _write_parts(
    source: Conversations,
    finder: ResponseFinder,
    size: int,
    tokenizer: PreTrainedTokenizerBase,
    writer: Writer,
    advance: Callable[[int], None],
) -> None:
    schema = schema_of("rollouts", ["response_mask", *(["teacher"] if source.teacher_by else [])])
    conversations, number = source.read(Counter()), 0
    while chunk := list(islice(conversations, size)):
        file = f"part-{number:05d}.parquet"
        if not writer.has(file):
            rows = [row for conversation in chunk for row in _rows(conversation, finder.find(conversation), tokenizer)]
            if rows:
                writer.write_table(file, pa.Table.from_pylist(rows, schema))
            advance(len(rows))
        number += 1


def _rows(
    conversation: Prompt, found: GivenConversation, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """Rows of the rollouts schema."""
    prompt_id = _prompt_id(conversation)
    for number, response in enumerate(found.responses):
        yield {
            "sample_id": f"{conversation.prompt_id}-{number}",
            "prompt_id": prompt_id,
            "source": conversation.source,
            "messages": text_messages(response.messages),
            "prompt_ids": response.prompt_ids,
            "response_ids": response.response_ids,
            "response": _readable(response, tokenizer),
            "finish_reason": "stop" if response.has_end else "length",
            "author": GIVEN,
            "teacher_tokens": 0,
            "response_mask": response.mask,
            "teacher": conversation.teacher,
        }


def _prompt_id(conversation: Prompt) -> str:
    """The id of a row, if it names one, else the hash of what precedes the first response.

    So a prompt has one id whatever its responses are, and `generate` with another policy gives it the same id.
    """
    tools = conversation.tools
    for messages in (conversation.messages, conversation.messages[1:]):  # an added system message counts in no id
        if conversation.prompt_id == json_digest(prompt_content(messages, tools))[:16]:
            first = next((i for i, m in enumerate(messages) if i and m["role"] == "assistant"), len(messages))
            return json_digest(prompt_content(messages[:first], tools))[:16]
    return conversation.prompt_id


def _readable(response: GivenResponse, tokenizer: PreTrainedTokenizerBase) -> str:
    """The decoded turns, with the context between them in brackets."""
    texts, position = list[str](), 0
    for turn in response_turns(len(response.mask), response.mask):
        if turn.start > position:
            context = tokenizer.decode(response.response_ids[position : turn.start], skip_special_tokens=True)
            texts.append(f"\n[context: {context.strip()}]\n")
        texts.append(tokenizer.decode(response.response_ids[turn.start : turn.stop], skip_special_tokens=True))
        position = turn.stop
    return "".join(texts)


def _without_zeros(counts: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}
