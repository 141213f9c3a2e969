"""Token ids as text that can be shown: by the student's own tokenizer file, without transformers.

What has no visible form is written in angle brackets: ⟨1b⟩ is a control character, ⟨e2 98⟩ two bytes of a character
that several tokens make together; the one that completes it shows it, as in ⟨83=☃⟩.
"""

import codecs
import re
import unicodedata
from functools import cache

from tokenizers import Tokenizer

from tsdkd.artifacts.hashing import json_digest
from tsdkd.errors import InputError
from tsdkd.stages.models.adapters import ADAPTER_CONFIG, base_model_name
from tsdkd.stages.models.paths import model_directory

FILE = "tokenizer.json"
LOST = "\ufffd"
"""What a decoder puts where bytes are no character."""
BYTE = re.compile("<0x([0-9A-F]{2})>")
"""A byte in a vocabulary that falls back to bytes."""
UNDECODED = re.compile("[\udc80-\udcff]+")
"""Bytes that are no character, as "surrogateescape" has them."""


class TokenTexts:
    """Texts of one tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    @property
    def fingerprint(self) -> str:
        """As a manifest records it."""
        return json_digest(sorted(self._tokenizer.get_vocab(with_added_tokens=True).items()))

    def of(self, token: int) -> str:
        """A token alone."""
        if token not in self._known:
            raw = self._bytes(token)
            self._known[token] = escape_controls(self._decoded(token)) if raw is None else _bracketed(raw)
        return self._known[token]

    def along(self, tokens: list[int]) -> list[str]:
        """Tokens one after the other: where several make a character, the last of them shows it."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        texts = []
        for token in tokens:
            text, raw = self.of(token), self._bytes(token)
            if raw is None:
                decoder.reset()
            else:
                begun = bool(decoder.getstate()[0])
                whole = decoder.decode(raw)
                if begun and whole and whole[0] != LOST:
                    text = text.replace("\u27e9", f"={escape_controls(whole[0])}\u27e9", 1)
            texts.append(text)
        return texts

    def _decoded(self, token: int) -> str:
        """With the space before it: decoders may drop that of a text's first token."""
        once, twice = (self._tokenizer.decode([token] * n, skip_special_tokens=False) for n in (1, 2))
        return twice[len(once) :] or f"#{token}"

    def _bytes(self, token: int) -> bytes | None:
        """A token that is not text by itself; None for the others."""
        if LOST not in self._tokenizer.decode([token], skip_special_tokens=False):
            return None
        name = self._tokenizer.id_to_token(token) or ""
        if found := BYTE.fullmatch(name):
            return bytes([int(found[1], 16)])
        alphabet = _byte_alphabet()
        return bytes(alphabet[c] for c in name) if name and all(c in alphabet for c in name) else None


def load_token_texts(model: str) -> TokenTexts:
    """Of a model directory, adapter or hub id. Raises InputError where it has no tokenizer file."""
    directory = model_directory(model, (FILE, "config.json", ADAPTER_CONFIG))
    if not (directory / FILE).is_file() and (base := base_model_name(directory)):
        return load_token_texts(base)
    try:
        return TokenTexts(Tokenizer.from_file(str(directory / FILE)))
    except Exception as error:  # the library raises nothing more precise
        raise InputError(
            f"{model} has no {FILE} that can be read ({str(error).splitlines()[0]}).",
            "Name a model of the same family that has one with --student.",
        ) from None


def escape_controls(text: str) -> str:
    """With line breaks and tabs, but without anything that commands a terminal or turns the direction of text."""
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else f"\u27e8{ord(c):02x}\u27e9" for c in text)


def show_whitespace(text: str) -> str:
    """On one line, spaces and line breaks shown."""
    return text.replace(" ", "\u2423").replace("\n", "\u21b5").replace("\t", "\u21e5")


def _bracketed(raw: bytes) -> str:
    parts = UNDECODED.split(text := raw.decode("utf-8", "surrogateescape"))
    lost = [found.encode("utf-8", "surrogateescape").hex(" ") for found in UNDECODED.findall(text)]
    shown = [escape_controls(part) for part in parts]
    return shown[0] + "".join(f"\u27e8{one}\u27e9{part}" for one, part in zip(lost, shown[1:], strict=True))


@cache
def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies: printable ones for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
