"""Chat templates: a system message reaches the model, and a template that drops messages is refused."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.helpers.chat_templates import TEMPLATES
from tests.helpers.models import CHAT, byte_tokenizer
from tsdkd.errors import InputError
from tsdkd.stages.models.chat import adds_system, fit_system, pair_end_ids, require_turns, turn_end_ids
from tsdkd.stages.models.chat_format import PLAIN_TEMPLATE

FOLDED = {"refused", "dropped", "alternating"}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Answer in French.\n"},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Un."},
    {"role": "user", "content": "Two?"},
]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_system_message_survives_the_template(kind: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[kind]
    fitted = fit_system(tokenizer, MESSAGES)
    text = tokenizer.apply_chat_template(fitted, tokenize=False)
    assert all(message["content"].strip() in text for message in MESSAGES)
    if kind in FOLDED:
        assert fitted == [{"role": "user", "content": "Answer in French.\n\nOne?"}, *MESSAGES[2:]]
    else:
        assert fitted is MESSAGES
    assert MESSAGES[1]["content"] == "One?"


def test_prompts_with_the_same_roles_share_one_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template with other content is probed anew."""
    tokenizer, rendered = byte_tokenizer(), []
    apply = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *args, **kwargs: rendered.append(1) or apply(*args, **kwargs)
    )
    for number in range(3):
        fit_system(tokenizer, [*MESSAGES[:3], {"role": "user", "content": str(number)}])
    assert len(rendered) == 1
    tokenizer.chat_template = TEMPLATES["refused"]
    assert len(fit_system(tokenizer, MESSAGES)) == 3


def test_messages_without_a_leading_system_message_stay() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES["refused"]
    for messages in (MESSAGES[1:], []):
        assert fit_system(tokenizer, messages) is messages


def test_a_system_message_joins_a_list_of_parts() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES["refused"]
    parts = [{"type": "text", "text": "One?"}]
    (user,) = fit_system(tokenizer, [MESSAGES[0], {"role": "user", "content": parts}])
    assert user["content"] == [{"type": "text", "text": "Answer in French.\n\n"}, *parts]


def test_all_leading_system_messages_are_joined() -> None:
    """Their parts of text too; empty ones and null contents are left out."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES["refused"]
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]
    systems = [{"role": "system", "content": content} for content in ("Be brief.", None, parts, "")]
    (user,) = fit_system(tokenizer, [*systems, {"role": "user", "content": "One?"}])
    assert user["content"] == "Be brief.\n\nBe kind.\n\nOne?"


def test_system_messages_are_joined_where_the_template_writes_the_first_alone() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES["dropped"].replace("'system' %}", "'system' or loop.first %}", 1)
    assert fit_system(tokenizer, MESSAGES) is MESSAGES
    (user,) = fit_system(tokenizer, [MESSAGES[0], {"role": "system", "content": "Be brief."}, MESSAGES[1]])
    assert user["content"] == "Answer in French.\n\nBe brief.\n\nOne?"


def test_a_conversation_that_needs_more_than_texts_keeps_its_system_message() -> None:
    """The markers of a tool's result are refused, as they name no call; the messages before it decide."""
    tokenizer = byte_tokenizer()
    refused = "{% for m in messages if m['role'] == 'tool' and not m['name'] %}{{ raise_exception('') }}{% endfor %}"
    messages = [*MESSAGES[:3], {"role": "tool", "name": "add", "content": "3"}]
    for template, kept in ((CHAT, True), (TEMPLATES["refused"], False)):
        tokenizer.chat_template = refused + template
        assert (fit_system(tokenizer, messages) is messages) == kept


@pytest.mark.parametrize(
    ("template", "adds"),
    [
        (TEMPLATES["default system"], True),
        (CHAT, False),
        (PLAIN_TEMPLATE, False),  # writes a system message without a heading, as DeepSeek's templates do
        ("{{ bos_token }}" + PLAIN_TEMPLATE, False),
    ],
)
def test_a_heading_of_the_user_is_no_system_message(template: str, adds: bool) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    assert adds_system(tokenizer) is adds


def test_a_template_that_drops_a_turn_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    require_turns(tokenizer, ("user",))
    with pytest.raises(InputError, match="refuses or drops messages of a prompt with the roles user, assistant, user"):
        require_turns(tokenizer, ("user", "assistant", "user"))
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(InputError, match="roles user"):
        require_turns(tokenizer, ("user",))


@pytest.mark.parametrize("template", [CHAT, "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"])
def test_the_token_that_ends_a_turn_comes_from_the_template(template: str) -> None:
    """A base model's end token may be another one."""
    tokenizer = byte_tokenizer(("<|endoftext|>",))
    tokenizer.eos_token, tokenizer.chat_template = "<|endoftext|>", template
    expected = [tokenizer.convert_tokens_to_ids("<|end|>")] if template is CHAT else []
    assert turn_end_ids(tokenizer) == expected
    assert pair_end_ids(tokenizer, [3], [258, 3]) == [3, *expected, 258]


def test_the_token_that_ends_the_last_turn_is_not_the_one_between_messages() -> None:
    """As in gpt-oss: <|end|> follows a thought and an earlier response, <|return|> the last one."""
    tokenizer = byte_tokenizer(("<|return|>",))
    tokenizer.chat_template = CHAT.replace(
        "'<|end|>\n'", "('<|return|>' if loop.last and m['role'] == 'assistant' else '<|end|>')"
    )
    assert turn_end_ids(tokenizer) == [tokenizer.convert_tokens_to_ids("<|return|>")]


def test_an_end_token_may_begin_with_the_text_of_another_one() -> None:
    tokenizer = byte_tokenizer(("<|end|>\n",))
    tokenizer.chat_template = CHAT
    assert turn_end_ids(tokenizer) == [tokenizer.convert_tokens_to_ids("<|end|>\n")]


def test_a_tokenizer_need_not_know_the_words_of_the_search() -> None:
    """A vocabulary of words fails on all others."""
    backend = Tokenizer(models.WordLevel({"user": 0, "assistant": 1, "<|end|>": 2}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=CHAT)
    assert turn_end_ids(tokenizer) == [2]
