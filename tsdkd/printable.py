"""Escapes untrusted text for terminals, tables and pages."""

import re
import unicodedata

_NOT_PLAIN_ASCII = re.compile(r"[^\x20-\x7e]")
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2028\u2029\u3164\ufe00-\ufe0d\uffa0\U000e0100-\U000e01ef]"
)
"""Line separators, fillers and selectors that are no control characters. The selectors of emoji stay."""

_MARKUP = re.compile(r"[\\`*_\[\]<>&|~$#!]")


def escape_controls(text: str, *, one_line: bool = False) -> str:
    r"""Write control, bidirectional, invisible and unassigned characters as code points, such as ⟨1b⟩.

    So no text injects terminal escape sequences, reorders a line or forges one. \n and \t stay; \n not on `one_line`.
    """
    kept = "\t" if one_line else "\n\t"
    return _NOT_PLAIN_ASCII.sub(
        lambda match: match[0] if match[0] in kept or _is_visible(match[0]) else _code(match[0]), text
    )


def escape_line(text: str) -> str:
    """Escape a text and replace its line breaks by spaces."""
    return escape_controls(" ".join(text.split()), one_line=True)


def escape_markdown(text: str) -> str:
    """Escape a text for one line or one table cell of Markdown, and for the HTML in it."""
    return _MARKUP.sub(r"\\\g<0>", escape_line(text))


def _is_visible(character: str) -> bool:
    return unicodedata.category(character)[0] != "C" and not _INVISIBLE.match(character)


def _code(character: str) -> str:
    return f"\u27e8{ord(character):02x}\u27e9"
