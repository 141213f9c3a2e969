"""Texts of tokens: spaces kept, pieces of characters told, nothing that commands a terminal."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

from tests.helpers.models import byte_tokenizer
from tsdkd.errors import InputError
from tsdkd.stages.inspect.token_texts import TokenTexts, load_token_texts, show_whitespace
from tsdkd.stages.models.record import model_record


@pytest.fixture(scope="module")
def by_bytes() -> Tokenizer:
    return byte_tokenizer().backend_tokenizer


@pytest.fixture(scope="module")
def by_pieces() -> Tokenizer:
    """As SentencePiece has it: a mark for spaces, the first of which is dropped, and single bytes for the rest."""
    words = ["\u2581Hello", "\u2581you", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def along(tokenizer: Tokenizer, text: str) -> list[str]:
    return TokenTexts(tokenizer).along(tokenizer.encode(text).ids)


def test_what_can_be_read_stays_as_it_is(by_bytes: Tokenizer) -> None:
    assert "".join(along(by_bytes, "a <b>\n\tc")) == "a <b>\n\tc"
    assert along(by_bytes, "<|end|>") == ["<|end|>"]


def test_pieces_of_a_character_are_told_and_the_last_shows_it(by_bytes: Tokenizer) -> None:
    assert along(by_bytes, "a\u2615\u2615") == ["a", *["\u27e8e2\u27e9", "\u27e898\u27e9", "\u27e895=\u2615\u27e9"] * 2]
    coffee = by_bytes.encode("\u2615").ids
    assert TokenTexts(by_bytes).along([*coffee[:2], *by_bytes.encode("a").ids, coffee[2]])[2:] == [
        "a",
        "\u27e895\u27e9",
    ]


def test_the_space_before_a_word_is_kept(by_pieces: Tokenizer) -> None:
    texts = TokenTexts(by_pieces)
    assert [texts.of(token) for token in (0, 1, 2)] == [" Hello", " you", "!"]
    bytes_of_coffee = [3 + byte for byte in "\u2615".encode()]
    assert texts.along(bytes_of_coffee) == ["\u27e8e2\u27e9", "\u27e898\u27e9", "\u27e895=\u2615\u27e9"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [("\x1b", "\u27e81b\u27e9"), ("\r", "\u27e80d\u27e9"), ("\u202e", "\u27e8ae=\u27e8202e\u27e9\u27e9")],
)
def test_nothing_commands_a_terminal_or_turns_text(by_bytes: Tokenizer, text: str, shown: str) -> None:
    assert along(by_bytes, text)[-1] == shown


def test_an_id_without_a_text_is_shown_as_a_number(by_bytes: Tokenizer) -> None:
    assert TokenTexts(by_bytes).of(9999) == "#9999"


def test_on_one_line() -> None:
    assert show_whitespace(" a\n\t") == "\u2423a\u21b5\u21e5"


def test_a_model_directory_an_adapter_and_a_hub_id(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a hub id only the tokenizer is fetched, not the weights."""
    known = model_record("student", str(student)).tokenizer
    assert load_token_texts(str(student)).fingerprint == known
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(student)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    assert load_token_texts(str(tmp_path)).fingerprint == known
    wanted: list[str] = []

    def snapshot(_: str, allow_patterns: list[str]) -> str:
        wanted.extend(allow_patterns)
        return str(student)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert load_token_texts("org/model").fingerprint == known
    assert "tokenizer.json" in wanted
    assert not [name for name in wanted if "safetensors" in name]


def test_a_model_without_a_tokenizer_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no tokenizer\.json that can be read"):
        load_token_texts(str(tmp_path))
