"""Text that a terminal, a table or a page shows as it is, whoever wrote it."""

import re
import unicodedata

_CANDIDATES = re.compile(r"[^\x20-\x7e]")
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2028\u2029\u3164\ufe00-\ufe0d\uffa0\U000e0100-\U000e01ef]"
)
"""Line separators, fillers and selectors that are no control characters. The selectors of emoji stay."""

_MARKUP = re.compile(r"[\\`*_\[\]<>&|~$#!]")


def escape_controls(text: str, *, one_line: bool = False) -> str:
    r"""Write control, bidirectional, invisible and unassigned characters as code points, such as ⟨1b⟩.

    No text then injects terminal escapes, reorders a line or forges another. \n and \t stay; \n not on `one_line`.
    """
    kept = "\t" if one_line else "\n\t"
    return _CANDIDATES.sub(
        lambda match: match[0] if match[0] in kept or _is_visible(match[0]) else _code(match[0]), text
    )


def in_one_line(text: str) -> str:
    """A text whose line breaks are spaces, escaped."""
    return escape_controls(" ".join(text.split()), one_line=True)


def in_markdown(text: str) -> str:
    """A text that Markdown, and the HTML in it, show as it is on one line, in a cell of a table too."""
    return _MARKUP.sub(r"\\\g<0>", in_one_line(text))


def _is_visible(character: str) -> bool:
    return unicodedata.category(character)[0] != "C" and not _INVISIBLE.match(character)


def _code(character: str) -> str:
    return f"\u27e8{ord(character):02x}\u27e9"
