"""Texts that inject terminal escape sequences, forge a line or break a table unless they are escaped."""

import unicodedata

HOSTILE = (
    "\x1b]0;title\x07",  # OSC: the terminal's title
    "\x1b[2J\x1b[31m",  # CSI: clears the screen
    "\x9b31m\x9d0;title\x9c",  # the same as C1 controls
    "a\x08\x08\x7f\x00\r",
    "\u202eevil\u202c\u2066x\u2069",  # bidirectional
    "zero\u200bwidth\u200d\ufeff\u00ad\u2060\u3164\u034f\U000e0041",
    "line\u2028separator\u0085next",
    "[red]markup[/red] [/] [link=https://x]x[/link]",
    "a | b ` c & d % e _ f # g $ h { i } j ~ k ^ l \\ m <b> * [n](o)",
    "one\nerror: forged\ntry:   forged",
    "=HYPERLINK(1)",
)
KEPT = "\n\t"


def is_harmless(printed: str) -> bool:
    """Whether a printed text has no character that is invisible or changes how others are shown."""
    invisible = "\u3164\u034f\u2028\u2029"
    return not any(c not in KEPT and (unicodedata.category(c)[0] == "C" or c in invisible) for c in printed)
