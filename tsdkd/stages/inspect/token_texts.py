"""Texts of token ids, by the student's tokenizer file alone, without transformers.

Angle brackets hold invisible characters as bytes: ⟨1b⟩ is a control character, ⟨e2 98⟩ are two bytes of a character
that spans several tokens. The token that completes the character shows it: ⟨83=☃⟩.
"""

import codecs
import re
from functools import cache

from tokenizers import Tokenizer

from tsdkd.artifacts.hashing import json_digest
from tsdkd.errors import InputError
from tsdkd.printable import escape_controls
from tsdkd.stages.models.adapters import ADAPTER_CONFIG
from tsdkd.stages.models.paths import base_directory, model_directory

TOKENIZER_FILE = "tokenizer.json"
REPLACEMENT = "\ufffd"
"""The character that decoders write for bytes that are no character."""
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
"""A byte in a vocabulary with byte fallback."""
UNDECODED = re.compile("[\udc80-\udcff]+")
"""Bytes that are no character, as the "surrogateescape" handler encodes them."""


class TokenTexts:
    """Decodes the tokens of one tokenizer for display."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    @property
    def fingerprint(self) -> str:
        """The tokenizer's fingerprint, as manifests record it."""
        return json_digest(sorted(self._tokenizer.get_vocab(with_added_tokens=True).items()))

    def decode(self, token: int) -> str:
        """The text of a single token."""
        if token not in self._texts:
            raw = self._incomplete_bytes(token)
            self._texts[token] = escape_controls(self._decode_alone(token)) if raw is None else _bracket_bytes(raw)
        return self._texts[token]

    def decode_sequence(self, tokens: list[int]) -> list[str]:
        """The texts of consecutive tokens; the last token of a split character shows the character."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        texts = []
        for token in tokens:
            text, raw = self.decode(token), self._incomplete_bytes(token)
            if raw is None:
                decoder.reset()
            else:
                in_character = bool(decoder.getstate()[0])
                decoded = decoder.decode(raw)
                if in_character and decoded and decoded[0] != REPLACEMENT:
                    text = text.replace("\u27e9", f"={escape_controls(decoded[0])}\u27e9", 1)
            texts.append(text)
        return texts

    def _decode_alone(self, token: int) -> str:
        """Decode the token after itself: decoders may drop the space before the first token of a text."""
        once, twice = (self._tokenizer.decode([token] * n, skip_special_tokens=False) for n in (1, 2))
        return twice[len(once) :] or f"#{token}"

    def _incomplete_bytes(self, token: int) -> bytes | None:
        """The bytes of a token that holds part of a character; None for all other tokens."""
        if REPLACEMENT not in self._tokenizer.decode([token], skip_special_tokens=False):
            return None
        name = self._tokenizer.id_to_token(token) or ""
        if match := BYTE_TOKEN.fullmatch(name):
            return bytes([int(match[1], 16)])
        alphabet = _byte_alphabet()
        return bytes(alphabet[c] for c in name) if name and all(c in alphabet for c in name) else None


def load_token_texts(model: str) -> TokenTexts:
    """Token texts of a model directory, adapter or hub id. Raises InputError without a readable tokenizer file."""
    directory = model_directory(model, (TOKENIZER_FILE, "config.json", ADAPTER_CONFIG))
    if not (directory / TOKENIZER_FILE).is_file():
        directory = base_directory(directory, (TOKENIZER_FILE, "config.json")) or directory
    try:
        return TokenTexts(Tokenizer.from_file(str(directory / TOKENIZER_FILE)))
    except Exception as error:  # tokenizers raises nothing more precise
        raise InputError(
            f"{model} has no readable {TOKENIZER_FILE} ({str(error).splitlines()[0]}).",
            "With --student, name a model of the same family that has one.",
        ) from None


def show_whitespace(text: str) -> str:
    """The text on one line, with visible signs for spaces, line breaks and tabs."""
    return text.replace(" ", "\u2423").replace("\n", "\u21b5").replace("\t", "\u21e5")


def _bracket_bytes(raw: bytes) -> str:
    """Decode the complete characters, and write the other bytes as hexadecimal in brackets."""
    text = raw.decode("utf-8", "surrogateescape")
    first, *rest = map(escape_controls, UNDECODED.split(text))
    incomplete = [match.encode("utf-8", "surrogateescape").hex(" ") for match in UNDECODED.findall(text)]
    return first + "".join(f"\u27e8{digits}\u27e9{part}" for digits, part in zip(incomplete, rest, strict=True))


@cache
def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies; printable characters stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
