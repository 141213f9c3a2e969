"""Thoughts in the text of a response: where they start, and the answer that follows them."""

import re

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
