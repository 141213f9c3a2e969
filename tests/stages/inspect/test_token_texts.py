"""Token texts keep spaces, show the bytes of split characters, and escape control characters."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

from tests.helpers.models import byte_tokenizer
from tsdkd.errors import InputError
from tsdkd.stages.inspect.token_texts import TokenTexts, load_token_texts, show_whitespace
from tsdkd.stages.models.record import model_record


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return byte_tokenizer().backend_tokenizer


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """Like SentencePiece: a mark for spaces, byte fallback, and a decoder that drops the first space."""
    words = ["\u2581Hello", "\u2581you", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def texts_of(tokenizer: Tokenizer, text: str) -> list[str]:
    return TokenTexts(tokenizer).decode_sequence(tokenizer.encode(text).ids)


def test_visible_text_is_unchanged(byte_level: Tokenizer) -> None:
    assert "".join(texts_of(byte_level, "a <b>\n\tc")) == "a <b>\n\tc"
    assert texts_of(byte_level, "<|end|>") == ["<|end|>"]


def test_split_characters_show_their_bytes_and_then_the_character(byte_level: Tokenizer) -> None:
    assert texts_of(byte_level, "a\u2615\u2615") == [
        "a",
        *["\u27e8e2\u27e9", "\u27e898\u27e9", "\u27e895=\u2615\u27e9"] * 2,
    ]
    coffee = byte_level.encode("\u2615").ids
    assert TokenTexts(byte_level).decode_sequence([*coffee[:2], *byte_level.encode("a").ids, coffee[2]])[2:] == [
        "a",
        "\u27e895\u27e9",
    ]


def test_the_space_before_a_word_is_kept(sentencepiece: Tokenizer) -> None:
    texts = TokenTexts(sentencepiece)
    assert [texts.decode(token) for token in (0, 1, 2)] == [" Hello", " you", "!"]
    bytes_of_coffee = [3 + byte for byte in "\u2615".encode()]
    assert texts.decode_sequence(bytes_of_coffee) == ["\u27e8e2\u27e9", "\u27e898\u27e9", "\u27e895=\u2615\u27e9"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [("\x1b", "\u27e81b\u27e9"), ("\r", "\u27e80d\u27e9"), ("\u202e", "\u27e8ae=\u27e8202e\u27e9\u27e9")],
)
def test_control_and_bidirectional_characters_are_escaped(byte_level: Tokenizer, text: str, shown: str) -> None:
    assert texts_of(byte_level, text)[-1] == shown


def test_an_unknown_id_is_shown_as_a_number(byte_level: Tokenizer) -> None:
    assert TokenTexts(byte_level).decode(9999) == "#9999"


def test_whitespace_is_shown_on_one_line() -> None:
    assert show_whitespace(" a\n\t") == "\u2423a\u21b5\u21e5"


def test_token_texts_load_from_a_directory_an_adapter_and_the_hub(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a hub model only the tokenizer is fetched."""
    expected = model_record("student", str(student)).tokenizer
    assert load_token_texts(str(student)).fingerprint == expected
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(student)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    assert load_token_texts(str(tmp_path)).fingerprint == expected
    patterns: list[str] = []

    def snapshot(_: str, revision: str | None, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        return str(student)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert load_token_texts("org/model").fingerprint == expected
    assert "tokenizer.json" in patterns
    assert not [name for name in patterns if "safetensors" in name]


def test_a_model_without_a_tokenizer_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no readable tokenizer\.json"):
        load_token_texts(str(tmp_path))
