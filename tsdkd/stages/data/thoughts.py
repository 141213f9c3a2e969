"""Thoughts: where they start in a response, the answer that follows them, and the texts of a message with one."""

import re
from typing import Any

THOUGHT_MARKERS = {
    "<think>": "</think>",  # Qwen3, DeepSeek-R1, and most others
    "<thinking>": "</thinking>",
    "[THINK]": "[/THINK]",  # Magistral
    "<seed:think>": "</seed:think>",  # Seed-OSS
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command A
}
"""The texts that start and end a thought."""
THOUGHT_START = re.compile(rf"\s*({'|'.join(map(re.escape, THOUGHT_MARKERS))}|<\|channel\|>analysis)\s*")
"""The start of a thought; gpt-oss marks it by a channel."""
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Fields in which messages keep a thought beside their content."""
_ANY_MARKER = re.compile("|".join(map(re.escape, (*THOUGHT_MARKERS, *THOUGHT_MARKERS.values()))))


def remove_thought(prompt: str, response: str) -> tuple[str, bool]:
    """What follows the last thought of a response, and whether that thought is finished; without a thought, all of it.

    The prompt may open the thought. The answer of an unfinished thought is empty.
    """
    for start, end in THOUGHT_MARKERS.items():
        _, closed, answer = response.rpartition(end)
        if answer.lstrip().startswith(start) or (not closed and prompt.rstrip().endswith(start)):
            return "", False
        if closed:
            return answer.lstrip(), True
    return response, True


def message_texts(message: dict[str, Any]) -> list[str]:
    """The thoughts and answers of a message: its texts without markers, which templates may write in another way."""
    content = message["content"]
    texts = [part.get("text") for part in content] if isinstance(content, list) else [content]
    texts = [*(message.get(name) for name in THOUGHT_FIELDS), *texts]
    return [piece for text in texts if isinstance(text, str) for piece in _ANY_MARKER.split(text) if piece.strip()]
