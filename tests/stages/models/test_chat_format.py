"""Chat formats: replaced templates, defaults for their keywords, and the plain format."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.helpers.chat_templates import NO_SYSTEM, TEMPLATES, THINKING, THINKING_BY_DEFAULT
from tests.helpers.models import CHAT, byte_tokenizer
from tsdkd.errors import InputError
from tsdkd.stages.config.chat import ChatConfig
from tsdkd.stages.models.chat_format import set_chat_format, template_defaults, template_with_defaults
from tsdkd.stages.models.record import model_record
from tsdkd.stages.models.spec import load_spec
from tsdkd.stages.models.tokenizers import chat_token_ids, load_tokenizer

HELLO = [{"role": "user", "content": "Hello"}]
TURNS = [*HELLO, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "How?"}]
OFF = ChatConfig(kwargs='{"enable_thinking": false}')


def tokenizer_with(template: str | None, *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.bos_token_id)]
        )
    return tokenizer


def rendered(template: str, messages: list[dict[str, str]] = TURNS, **keywords: Any) -> str:
    text: str = tokenizer_with(template).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **keywords
    )
    return text


@pytest.mark.parametrize(
    "template",
    [
        THINKING,
        THINKING_BY_DEFAULT,
        *(
            start + THINKING
            for start in ("\n", "\n\n  ", "  text\n", "  {% if true %}\n  a{% endif %}\n", "{#- c #}\n")
        ),
        "  {%- if not enable_thinking %}off{% endif %}" + CHAT,
    ],
)
@pytest.mark.parametrize("value", [True, False])
def test_a_default_writes_the_bytes_of_the_given_keyword(template: str, value: bool) -> None:
    """Whatever the template begins with; the caller still overrides it."""
    changed = template_with_defaults(template, {"enable_thinking": value})
    assert rendered(changed) == rendered(template, enable_thinking=value)
    assert rendered(changed, enable_thinking=not value) == rendered(template, enable_thinking=not value)
    assert rendered(changed) != rendered(changed, enable_thinking=not value)


def test_without_keywords_a_template_keeps_its_bytes() -> None:
    for template in (*TEMPLATES.values(), THINKING):
        tokenizer = tokenizer_with(template)
        set_chat_format(tokenizer, ChatConfig())
        assert tokenizer.chat_template == template == template_with_defaults(template, {})


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(JSON_VALUES)
def test_every_json_value_is_a_default(value: Any) -> None:
    changed = template_with_defaults("{{ x | tojson }}", {"x": value})
    assert json.loads(rendered(changed)) == value
    assert template_defaults(changed) == {"x": value}
    assert template_with_defaults(changed, {"x": 1}) == template_with_defaults("{{ x | tojson }}", {"x": 1})


def test_defaults_are_merged_and_applied_once() -> None:
    once = template_with_defaults("{{ x }}{{ y }}", {"x": "#} {% {{ \" ' \\"})
    assert template_with_defaults(once, {"x": "#} {% {{ \" ' \\"}) == once
    both = template_with_defaults(once, {"y": 2})
    assert rendered(both) == "#} {% {{ \" ' \\2"
    assert list(template_defaults(both)) == ["x", "y"]
    assert template_defaults("{# chat-template-kwargs of no JSON #}") == template_defaults(None) == {}


def test_generation_blocks_are_tracked_with_a_default() -> None:
    masks = []
    for template in (THINKING_BY_DEFAULT, template_with_defaults(THINKING_BY_DEFAULT, {"enable_thinking": True})):
        found = tokenizer_with(template).apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
        masks.append((found["input_ids"], found["assistant_masks"]))
    assert masks[0] == masks[1]
    assert sum(masks[0][1]) == len("Hi.") + 1


@pytest.mark.parametrize(
    ("template", "kwargs", "cause"),
    [
        (CHAT, '{"enable_thinking": false}', "does not read the keyword enable_thinking"),
        (THINKING, '{"enable_thinkng": false}', "does not read the keyword enable_thinkng"),
        (THINKING, '{"bos_token": "a"}', "has the keyword bos_token"),
        (None, '{"enable_thinking": false}', "no chat template that reads enable_thinking"),
    ],
)
def test_a_keyword_without_effect_is_refused(template: str | None, kwargs: str, cause: str) -> None:
    with pytest.raises(InputError, match=cause) as caught:
        set_chat_format(tokenizer_with(template), ChatConfig(kwargs=kwargs))
    assert template is not THINKING or "bos" in kwargs or "the template reads: enable_thinking" in caught.value.remedy


@pytest.mark.parametrize("kwargs", ["{", "[1]", '{"a b": 1}', '{"messages": []}', '{"a": NaN}', '{"a": 1e999}', '"a"'])
def test_keywords_that_are_no_json_object_of_names_are_refused(kwargs: str) -> None:
    with pytest.raises(InputError, match="--chat-template-kwargs"):
        ChatConfig(kwargs=kwargs)


@pytest.mark.parametrize("value", ["true", "False"])
def test_a_truth_value_as_text_is_refused(value: str) -> None:
    """Qwen3's template asks whether the keyword is false, and no text is: it would think."""
    with pytest.raises(InputError, match="has the text") as caught:
        ChatConfig(kwargs=json.dumps({"enable_thinking": value}))
    assert caught.value.remedy == f"Write {value.lower()} without quotes."


def test_a_misspelled_keyword_is_answered_with_the_names_of_keywords() -> None:
    """Without what the template sets for itself, which jinja also counts where only a branch sets it."""
    own = "{% for m in messages %}{% if m.content is string %}{% set c = m.content %}{% endif %}{{ c }}{% endfor %}"
    with pytest.raises(InputError) as caught:
        set_chat_format(tokenizer_with(THINKING_BY_DEFAULT + own), ChatConfig(kwargs='{"thinking": false}'))
    assert caught.value.remedy.endswith("the template reads: enable_thinking.")


def test_one_format_has_one_text() -> None:
    assert ChatConfig(kwargs='{"b":1,"a":2}') == ChatConfig(kwargs='{"a": 2, "b": 1}')
    assert not ChatConfig(kwargs="{}").is_set


def test_several_templates_get_the_default() -> None:
    tokenizer = tokenizer_with(None)
    tokenizer.chat_template = {"default": THINKING, "tool_use": CHAT}
    set_chat_format(tokenizer, OFF)
    assert "</think>" in tokenizer.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
    assert template_defaults(tokenizer.chat_template) == {"enable_thinking": False}


def test_a_file_replaces_the_template(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text(THINKING)
    tokenizer = tokenizer_with(CHAT)
    set_chat_format(tokenizer, ChatConfig(str(file)))
    assert tokenizer.chat_template == THINKING
    set_chat_format(tokenizer, ChatConfig(str(file), OFF.kwargs))
    assert tokenizer.chat_template == template_with_defaults(THINKING, {"enable_thinking": False})


@pytest.mark.parametrize(
    ("content", "cause"),
    [(None, "does not exist"), (b" \n", "is empty"), (b"\xff", "not UTF-8"), (b"{% if %}", "not a jinja template")],
)
def test_a_file_that_is_no_template_is_refused(content: bytes | None, cause: str, tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=cause):
        set_chat_format(tokenizer_with(CHAT), ChatConfig(str(file)))


def test_a_word_that_is_no_file_is_answered_with_plain() -> None:
    with pytest.raises(InputError) as error:
        set_chat_format(tokenizer_with(CHAT), ChatConfig("chatml"))
    assert error.value.remedy == "Name a jinja file, or plain, the format for models without a chat template."


def test_the_plain_format() -> None:
    tokenizer = tokenizer_with(None)
    set_chat_format(tokenizer, ChatConfig("plain"))
    messages = [{"role": "system", "content": "Be brief."}, *TURNS]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "Be brief.\n\nUser:\nHello\n\nAssistant:\nHi.<|end|>User:\nHow?\n\nAssistant:\n"
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == "Hi.<|end|>"
    with pytest.raises(InputError, match="roles system, user and assistant"):
        chat_token_ids(tokenizer, [*TURNS, {"role": "tool", "content": "1"}])
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(InputError, match="no tool calls"):
        chat_token_ids(tokenizer, [*HELLO, call])
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="the tokenizer has none"):
        set_chat_format(tokenizer, ChatConfig("plain"))


@pytest.mark.parametrize(
    ("template", "adds_bos", "count"),
    [(NO_SYSTEM, True, 1), (NO_SYSTEM, False, 1), ("{{ messages[0]['content'] }}", True, 0)],
)
def test_a_prompt_has_the_bos_tokens_of_its_template(template: str, adds_bos: bool, count: int) -> None:
    """As transformers' own chat path writes it, which adds no special tokens."""
    tokenizer = tokenizer_with(template, adds_bos=adds_bos)
    ids = chat_token_ids(tokenizer, HELLO)
    expected = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    assert ids == expected
    assert ids.count(tokenizer.bos_token_id) == count


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_plain_format_begins_as_plain_text_does(adds_bos: bool) -> None:
    tokenizer = tokenizer_with(None, adds_bos=adds_bos)
    set_chat_format(tokenizer, ChatConfig("plain"))
    assert chat_token_ids(tokenizer, HELLO).count(tokenizer.bos_token_id) == adds_bos


def test_a_models_records_have_the_changed_template(student: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text(THINKING)
    chat = ChatConfig(str(file), OFF.kwargs)
    assert template_defaults(load_spec(str(student), chat).tokenizer.chat_template) == {"enable_thinking": False}
    own, changed = (model_record("student", str(student), hashed=False, chat=c) for c in (None, chat))
    assert (own.tokenizer, own.chat_template != changed.chat_template) == (changed.tokenizer, True)
    assert model_record("student", str(student), hashed=False, chat=ChatConfig()) == own
    assert load_tokenizer(str(student)).chat_template == CHAT
