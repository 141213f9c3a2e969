"""Tokenizers: the vocabulary, the end tokens and the chat template that prompts need."""

import random
from pathlib import Path

import pytest
from transformers import GenerationConfig

from tsdkd.errors import InputError
from tsdkd.stages.models.tokenizers import chat_token_ids, end_token_ids, load_tokenizer, vocab_size

MESSAGES = [{"role": "user", "content": "Hi"}]


def test_vocab_size_counts_added_tokens(other_family: Path) -> None:
    assert vocab_size(load_tokenizer(str(other_family))) == 259


def test_end_tokens_come_from_the_generation_config_and_the_tokenizer(student: Path) -> None:
    tokenizer = load_tokenizer(str(student))
    end = tokenizer.eos_token_id
    assert end_token_ids(None, tokenizer, 258) == [end]
    for configured in (3, [end, 3], [128001, end, 3, -1]):  # without those that the model does not know
        assert end_token_ids(GenerationConfig(eos_token_id=configured), tokenizer, 258) == sorted({end, 3})
    tokenizer.eos_token = None
    assert end_token_ids(GenerationConfig(), tokenizer, 258) == []


def test_end_tokens_that_are_not_ids_are_refused(student: Path) -> None:
    with pytest.raises(InputError, match=r"eos_token_id .* is '2', not a token id"):
        end_token_ids(GenerationConfig(eos_token_id="2"), load_tokenizer(str(student)), 600)


def test_a_model_without_files_of_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(InputError, match="has no tokenizer: its vocabulary is empty"):
        load_tokenizer(str(tmp_path))


def test_a_missing_or_refusing_chat_template_is_named(student: Path) -> None:
    tokenizer = load_tokenizer(str(student))
    assert chat_token_ids(tokenizer, MESSAGES)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(InputError, match=r"refuses a prompt with the roles user \(no system role\)"):
        chat_token_ids(tokenizer, MESSAGES)
    tokenizer.chat_template = {"rag": "a", "tool_use": "b"}
    with pytest.raises(InputError, match="none is the default: rag, tool_use"):
        chat_token_ids(tokenizer, MESSAGES)
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    assert tokenizer.decode(chat_token_ids(tokenizer, MESSAGES)) == "a"
    assert tokenizer.decode(chat_token_ids(tokenizer, MESSAGES, [{"name": "f"}])) == "b"
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        chat_token_ids(tokenizer, MESSAGES)


def test_a_template_that_draws_words_draws_the_same_ones(student: Path) -> None:
    tokenizer = load_tokenizer(str(student))
    tokenizer.chat_template = "{{ range(100000) | random }}"
    state = random.getstate()
    assert chat_token_ids(tokenizer, MESSAGES) == chat_token_ids(tokenizer, MESSAGES)
    assert random.getstate() == state
