"""Renders chat templates, which are programs that come with a model, in bounded time and memory."""

import re
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from tsdkd.errors import InputError

SECONDS = 10.0
"""Processor time of one rendering; real templates take milliseconds."""
MEMORY = 1 << 30
"""Bytes that a rendering may add to the process, on Linux."""
CHARACTERS = 1 << 27
"""The longest text that a rendering may write."""
REMEDY = "Correct the tokenizer's chat template, or copy it from the original model."


class _TimeUpError(BaseException):
    """A BaseException, because a template's filters may catch Exception."""


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **arguments: Any) -> str:
    """The text of transformers' `apply_chat_template`, with its arguments.

    Raises the InputError of `bounded_rendering`, and the errors of the template, which have many types.
    """
    with bounded_rendering():
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    if len(text) > CHARACTERS:
        raise InputError(f"The chat template writes {len(text):,} characters for one prompt.", REMEDY)
    return text


def has_generation_markers(template: str) -> bool:
    """Whether a chat template marks the text that the assistant writes."""
    return bool(re.search(r"\{%-?\s*generation\s*-?%\}", template))


def marked_token_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **arguments: Any
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and the mask of transformers' `return_assistant_tokens_mask`; else as `render_chat`.

    Needs a tokenizer that knows the characters of its tokens, and a template with generation markers.
    """
    with bounded_rendering():
        encoding = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **arguments
        )
    return list(encoding["input_ids"]), list(map(bool, encoding["assistant_masks"]))


@lru_cache(maxsize=8)
def require_compilable(template: str) -> None:
    """Raises InputError for a chat template that jinja cannot read."""
    try:
        with bounded_rendering():
            _compile_jinja_template(template)
    except (TemplateSyntaxError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise InputError(f"The chat template is not a jinja template{line} ({error}).", REMEDY) from None


@contextmanager
def bounded_rendering() -> Iterator[None]:
    """Raises InputError if the block takes more than `SECONDS` or `MEMORY`.

    Time is bounded in the main thread only, because signals arrive there.
    """
    try:
        with ExitStack() as stack:
            stack.enter_context(_bounded_memory())
            if threading.current_thread() is threading.main_thread():
                stack.enter_context(_bounded_time())
            yield
    except _TimeUpError:
        raise InputError(f"The chat template does not end within {SECONDS:g} s.", REMEDY) from None
    except MemoryError:
        raise InputError(f"The chat template needs more than {MEMORY / 1e9:.1f} GB of memory.", REMEDY) from None


@contextmanager
def _bounded_time() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TimeUpError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _bounded_memory() -> Iterator[None]:
    statistics = Path("/proc/self/statm")
    if not statistics.is_file():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(statistics.read_text(encoding="ascii").split()[0]) * resource.getpagesize() + MEMORY
    if soft != resource.RLIM_INFINITY:
        limit = min(soft, limit)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
