"""Given responses: the spans of the assistant's turns, in templates of every kind, with exact token boundaries."""

from collections import Counter
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers.chat_templates import CONVERSATIONS, SPECIAL
from tests.helpers.models import byte_tokenizer
from tsdkd.errors import InputError
from tsdkd.stages.data.given_responses import GivenConversation, GivenResponse, ResponseFinder
from tsdkd.stages.data.prompts import Prompt
from tsdkd.stages.data.turns import response_turns
from tsdkd.stages.models.tokenizers import ConversationWriter

CALL = [{"type": "function", "function": {"name": "sum", "arguments": {}}}]
TWO_TURNS = [
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "Four."},
]
WITH_TOOLS = [
    {"role": "system", "content": "Use tools."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "I call.", "tool_calls": CALL},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Welcome."},
    {"role": "user", "content": "Bye"},
]
TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {}}}]


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(SPECIAL)
    tokenizer.chat_template = CONVERSATIONS[template]
    return tokenizer


def find(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict[str, Any]],
    tools: Any = None,
    turns: Any = "all",
    limits: tuple[int, int] = (500, 500),
) -> GivenConversation:
    ends = tokenizer.convert_tokens_to_ids(["<|end|>", "<|text_end|>"])
    finder = ResponseFinder(ConversationWriter(tokenizer, None), ends, turns, *limits)
    return finder.find(Prompt("id", "source", messages, tools, "rows.jsonl, line 1"))


def texts(response: GivenResponse, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of the prompt, then those of the turns, and of the context between them in brackets."""
    pieces, position = [tokenizer.decode(response.prompt_ids)], 0
    for turn in response_turns(len(response.mask), response.mask):
        context = tokenizer.decode(response.response_ids[position : turn.start])
        pieces += [f"[{context}]"] if context else []
        pieces.append(tokenizer.decode(response.response_ids[turn.start : turn.stop]))
        position = turn.stop
    assert position == len(response.response_ids)
    return pieces


EXPECTED = {
    "chatml": [
        "<|start|>user\nHi?<|end|>\n<|start|>assistant\n",
        "Hello.<|end|>",
        "[\n<|start|>user\n2 + 2?<|end|>\n<|start|>assistant\n]",
        "Four.<|end|>",
    ],
    "headers": [
        "<|start|><|head|>user<|/head|>\n\nHi?<|end|><|head|>assistant<|/head|>\n\n",
        "Hello.<|end|>",
        "[<|head|>user<|/head|>\n\n2 + 2?<|end|><|head|>assistant<|/head|>\n\n]",
        "Four.<|end|>",
    ],
    "instructions": ["<|start|>[INST] Hi? [/INST]", " Hello.<|end|>", "[[INST] 2 + 2? [/INST]]", " Four.<|end|>"],
}
EXPECTED |= {"marked": EXPECTED["chatml"], "end of text": EXPECTED["chatml"]}


@pytest.mark.parametrize("template", EXPECTED)
def test_the_turns_of_a_conversation(template: str) -> None:
    """One response: the ids of the whole conversation, cut after the last end token; the mask marks the turns."""
    tokenizer = tokenizer_of(template)
    found = find(tokenizer, TWO_TURNS)
    (response,) = found.responses
    assert texts(response, tokenizer) == EXPECTED[template]
    whole = tokenizer.apply_chat_template(TWO_TURNS, return_dict=False)
    length = len(response.prompt_ids) + len(response.response_ids)
    assert response.prompt_ids + response.response_ids == whole[:length]
    assert response.messages == TWO_TURNS[:1]
    assert response.has_end
    assert not found.is_split
    assert not +found.skipped_turns


@pytest.mark.parametrize("template", ["chatml", "marked"])
def test_tool_calls_and_their_results_are_context(template: str) -> None:
    """A text beside a tool call, too; messages after the last turn are left out."""
    tokenizer = tokenizer_of(template)
    (response,) = find(tokenizer, WITH_TOOLS, TOOLS).responses
    prompt, *rest = texts(response, tokenizer)
    assert prompt.endswith("I call.<call>sum</call><|end|>\n<|start|>tool\n4<|end|>\n<|start|>assistant\n")
    assert rest == ["Four.<|end|>", "[\n<|start|>user\nThanks<|end|>\n<|start|>assistant\n]", "Welcome.<|end|>"]
    assert response.messages == WITH_TOOLS[:4]


def test_markers_give_transformers_own_mask() -> None:
    """On a conversation whose assistant messages are all learned, and on one with characters of two tokens."""
    tokenizer = tokenizer_of("marked")
    for messages in (
        TWO_TURNS,
        [*TWO_TURNS, {"role": "user", "content": "é\n"}, {"role": "assistant", "content": "ü"}],
    ):
        (response,) = find(tokenizer, messages).responses
        theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        mask = [0] * len(response.prompt_ids) + [int(learned) for learned in response.mask]
        assert theirs["assistant_masks"] == mask + [0] * (len(theirs["input_ids"]) - len(mask))
        unmarked = tokenizer_of("chatml")
        assert find(unmarked, messages).responses == [response]


def test_a_marker_after_the_end_token_is_left_out() -> None:
    """Many templates mark the line break after it."""
    tokenizer, moved = tokenizer_of("marked"), tokenizer_of("marked")
    moved.chat_template = moved.chat_template.replace("{% endgeneration %}{{ '\n' }}", "{{ '\n' }}{% endgeneration %}")
    theirs = moved.apply_chat_template(TWO_TURNS, return_dict=True, return_assistant_tokens_mask=True)
    (response,) = find(moved, TWO_TURNS).responses
    assert sum(theirs["assistant_masks"]) == sum(response.mask) + 2
    assert find(tokenizer, TWO_TURNS).responses == [response]


def test_a_marker_that_leaves_out_the_end_token_teaches_no_end() -> None:
    tokenizer = tokenizer_of("marked")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ '<|end|>' }}{% endgeneration %}", "{% endgeneration %}{{ '<|end|>' }}"
    )
    (response,) = find(tokenizer, TWO_TURNS).responses
    assert texts(response, tokenizer)[1::2] == ["Hello.", "Four."]
    assert not response.has_end


def test_a_template_that_removes_earlier_thoughts_splits_the_conversation() -> None:
    """Each turn is a response to the prompt that the model would read, with its own thought."""
    tokenizer = tokenizer_of("thoughts")
    messages = [message | {} for message in TWO_TURNS]
    messages[1]["content"] = "<think>\nGreet.\n</think>\n\nHello."
    found = find(tokenizer, messages)
    assert found.is_split
    first, second = found.responses
    assert texts(first, tokenizer) == [
        "<|start|>user\nHi?<|end|>\n<|start|>assistant\n",
        "<think>\nGreet.\n</think>\n\nHello.<|end|>",
    ]
    prompt = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=False)
    assert second.prompt_ids == prompt
    assert "Greet" not in tokenizer.decode(prompt)
    assert texts(second, tokenizer)[1:] == ["<think>\n\n</think>\n\nFour.<|end|>"]
    assert (first.messages, second.messages) == (messages[:1], messages[:3])


MARKED_THOUGHTS = CONVERSATIONS["thoughts"].replace("{% if loop.index0 >", "{% generation %}{% if loop.index0 >")
MARKED_THOUGHTS = MARKED_THOUGHTS.replace("+ '<|end|>\n' }}", "+ '<|end|>' }}{% endgeneration %}{{ '\n' }}")


def test_markers_around_text_without_earlier_thoughts_split_the_conversation() -> None:
    """As in the template without markers; the mask of the whole conversation would teach answers without thoughts."""
    tokenizer, unmarked = tokenizer_of("thoughts"), tokenizer_of("thoughts")
    tokenizer.chat_template = MARKED_THOUGHTS
    thoughts = ["<think>\nGreet.\n</think>\n\nHello.", "<think>\nAdd.\n</think>\n\nFour."]
    messages = [TWO_TURNS[0], TWO_TURNS[1] | {"content": thoughts[0]}, TWO_TURNS[2], TWO_TURNS[3]]
    messages[3] = TWO_TURNS[3] | {"content": thoughts[1]}
    found = find(tokenizer, messages)
    assert [texts(response, tokenizer)[1:] for response in found.responses] == [[f"{t}<|end|>"] for t in thoughts]
    assert found == find(unmarked, messages)
    assert not find(tokenizer, [TWO_TURNS[0], messages[1], {"role": "tool", "content": "ok"}, messages[3]]).is_split
    assert len(find(tokenizer, TWO_TURNS).responses) == 1


@pytest.mark.parametrize("template", ["chatml", "marked"])
@pytest.mark.parametrize("fields", [{"reasoning_content": "I greet."}, {"thinking": "I greet."}])
def test_a_thought_that_the_template_does_not_write_is_refused(template: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"line 1: .* leaves out a thought or a text of message 2"):
        find(tokenizer_of(template), [TWO_TURNS[0], TWO_TURNS[1] | fields, *TWO_TURNS[2:]])
    tokenizer = tokenizer_of(template)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m['content'] or '' }}", "{{ (m['content'] or '').split('</think>')[-1] }}"
    )
    messages = [*TWO_TURNS[:3], TWO_TURNS[3] | {"content": "<think>Add.</think>Four."}]
    with pytest.raises(InputError, match="leaves out a thought or a text of message 4"):
        find(tokenizer, messages)


@pytest.mark.parametrize("field", ["reasoning_content", "thinking"])
def test_a_thought_of_a_field_is_learned_where_the_template_writes_it(field: str) -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m['content'] or '' }}", f"{{{{ '<think>' + (m['{field}'] or '') + '</think>' + (m['content'] or '') }}}}"
    )
    (response,) = find(tokenizer, [TWO_TURNS[0], TWO_TURNS[1] | {field: "I  greet."}]).responses
    assert texts(response, tokenizer)[1:] == ["<think>I  greet.</think>Hello.<|end|>"]


def test_turns_after_one_user_message_keep_their_thoughts_and_stay_together() -> None:
    tokenizer = tokenizer_of("thoughts")
    messages = [*TWO_TURNS[:2], {"role": "tool", "content": "ok"}, TWO_TURNS[3]]
    found = find(tokenizer, messages)
    assert not found.is_split
    assert texts(found.responses[0], tokenizer)[1::2] == [
        "<think>\n\n</think>\n\nHello.<|end|>",
        "<think>\n\n</think>\n\nFour.<|end|>",
    ]


def test_a_template_that_writes_another_turn_than_it_prompts_for_is_refused() -> None:
    """Its prompt opens a thought that its conversations do not have."""
    with pytest.raises(InputError, match=r"rows.jsonl, line 1: .*message 2, an assistant's, in another way"):
        find(tokenizer_of("opened thought"), TWO_TURNS)


def test_only_the_last_turn_is_learned() -> None:
    tokenizer = tokenizer_of("chatml")
    (response,) = find(tokenizer, WITH_TOOLS, TOOLS, turns="last").responses
    assert texts(response, tokenizer)[1:] == ["Welcome.<|end|>"]
    assert response.messages == WITH_TOOLS[:6]


@pytest.mark.parametrize("template", ["chatml", "marked"])
@pytest.mark.parametrize("field", [{"weight": 0}, {"train": False}])
def test_a_message_of_weight_zero_is_context(template: str, field: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(template)
    messages = [TWO_TURNS[0], TWO_TURNS[1] | field, TWO_TURNS[2], TWO_TURNS[3] | {"weight": 1}]
    (response,) = find(tokenizer, messages).responses
    assert response.prompt_ids == find(tokenizer, TWO_TURNS, turns="last").responses[0].prompt_ids
    assert all("weight" not in message and "train" not in message for message in response.messages)


def test_a_weight_between_zero_and_one_is_refused() -> None:
    with pytest.raises(InputError, match=r"line 1: the weight of message 2 is 0\.5"):
        find(tokenizer_of("chatml"), [TWO_TURNS[0], TWO_TURNS[1] | {"weight": 0.5}])


@pytest.mark.parametrize(
    "messages",
    [
        TWO_TURNS[:1],
        [{"role": "assistant", "content": "Hello."}],
        [TWO_TURNS[0], {"role": "assistant", "content": "  "}],
        [TWO_TURNS[0], {"role": "assistant", "content": None, "tool_calls": CALL}],
    ],
)
def test_conversations_without_a_turn_have_no_response(messages: list[dict[str, Any]]) -> None:
    assert find(tokenizer_of("chatml"), messages) == GivenConversation([], Counter())


def test_a_greeting_that_nothing_precedes_is_context() -> None:
    tokenizer = tokenizer_of("chatml")
    (response,) = find(tokenizer, [{"role": "assistant", "content": "Hey!"}, *TWO_TURNS]).responses
    assert texts(response, tokenizer)[0].startswith("<|start|>assistant\nHey!<|end|>\n<|start|>user")


def test_consecutive_assistant_messages_are_turns_of_their_own() -> None:
    tokenizer = tokenizer_of("chatml")
    (response,) = find(tokenizer, [*TWO_TURNS[:2], TWO_TURNS[3]]).responses
    assert texts(response, tokenizer)[1:] == ["Hello.<|end|>", "[\n<|start|>assistant\n]", "Four.<|end|>"]
    with pytest.raises(InputError, match="roles must alternate"):
        find(tokenizer_of("instructions"), [*TWO_TURNS[:2], TWO_TURNS[3]])


def test_limits_cut_turns_from_the_end() -> None:
    """Up to 7 tokens hold the first turn, and 39 begin the second; a cut turn has no end token."""
    tokenizer = tokenizer_of("chatml")
    (whole,) = find(tokenizer, TWO_TURNS).responses
    begins = len(whole.mask) - 6
    for limit, length, turns, dropped, has_end in (
        (3, 3, 1, 1, False),
        (7, 7, 1, 1, True),
        (begins, 7, 1, 1, True),
        (begins + 2, begins + 2, 2, 0, False),
        (begins + 5, begins + 5, 2, 0, False),
        (begins + 6, begins + 6, 2, 0, True),
    ):
        found = find(tokenizer, TWO_TURNS, limits=(500, limit))
        (response,) = found.responses
        assert response.response_ids == whole.response_ids[:length]
        assert response.mask == whole.mask[:length]
        assert len(response_turns(length, response.mask)) == turns
        assert found.skipped_turns["limit"] == dropped
        assert response.has_end == has_end


def test_a_prompt_beyond_the_limit_has_no_response() -> None:
    tokenizer = tokenizer_of("chatml")
    length = len(find(tokenizer, TWO_TURNS).responses[0].prompt_ids)
    assert find(tokenizer, TWO_TURNS, limits=(length, 500)).responses
    found = find(tokenizer, TWO_TURNS, limits=(length - 1, 500))
    assert not found.responses
    assert +found.skipped_turns == Counter(too_long=2)


def test_split_turns_have_limits_of_their_own() -> None:
    """The first turn is cut, the second turn's prompt is one token too long."""
    tokenizer = tokenizer_of("thoughts")
    second = find(tokenizer, TWO_TURNS).responses[1]
    found = find(tokenizer, TWO_TURNS, limits=(len(second.prompt_ids) - 1, 20))
    assert [len(response.response_ids) for response in found.responses] == [20]
    assert +found.skipped_turns == Counter(too_long=1)


def test_a_long_conversation_is_not_taken_for_a_split_one() -> None:
    """Texts are cut before they become ids; what is compared lies before the cut."""
    tokenizer = tokenizer_of("chatml")
    longest = max(map(len, tokenizer.get_vocab()))
    messages = [*TWO_TURNS[:3], {"role": "assistant", "content": "x" * 100 * longest}, *TWO_TURNS]
    found = find(tokenizer, messages, limits=(45, 40))
    assert not found.is_split
    assert +found.skipped_turns == Counter(limit=3 - 1)
    assert [len(response.response_ids) for response in found.responses] == [40]


def test_a_token_that_holds_the_end_of_the_prompt_makes_its_turn_context() -> None:
    """The response begins with a line break, which joins the template's own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "ĊĊ"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|start|>", "<|end|>", "<|text_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CONVERSATIONS["chatml"])
    messages = [*TWO_TURNS[:3], {"role": "assistant", "content": "\nFour."}]
    found = find(tokenizer, messages)
    assert texts(found.responses[0], tokenizer)[1:] == ["Hello.<|end|>"]
    assert +found.skipped_turns == Counter(unaligned=1)
    assert not find(tokenizer, messages[2:]).responses


def test_a_turn_without_an_end_token_in_the_template() -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    (response,) = find(tokenizer, TWO_TURNS).responses
    assert texts(response, tokenizer) == ["user: Hi?\nassistant: ", "Hello.", "[\nuser: 2 + 2?\nassistant: ]", "Four."]
    assert not response.has_end


@pytest.mark.parametrize("template", ["chatml", "marked"])
def test_special_tokens_after_the_end_token_are_context(template: str) -> None:
    tokenizer = tokenizer_of(template)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|end|><|/head|>")
    (response,) = find(tokenizer, TWO_TURNS).responses
    assert texts(response, tokenizer)[1::2] == ["Hello.<|end|>", "Four.<|end|>"]
    assert response.has_end


def test_a_turn_of_end_tokens_alone_is_left_out() -> None:
    """Its text is that of a special token: nothing of it could be learned."""
    tokenizer = tokenizer_of("chatml")
    found = find(tokenizer, [*TWO_TURNS[:3], TWO_TURNS[3] | {"content": "<|end|>"}])
    assert texts(found.responses[0], tokenizer)[1:] == ["Hello.<|end|>"]
    assert +found.skipped_turns == Counter(unaligned=1)
    assert not find(tokenizer, [TWO_TURNS[0], TWO_TURNS[1] | {"content": "<|end|>"}]).responses


def test_a_system_message_joins_the_user_where_the_template_refuses_it() -> None:
    tokenizer = tokenizer_of("instructions")
    messages = [{"role": "system", "content": "Be kind."}, *TWO_TURNS]
    (response,) = find(tokenizer, messages).responses
    assert texts(response, tokenizer)[:2] == ["<|start|>[INST] Be kind.\n\nHi? [/INST]", " Hello.<|end|>"]


def test_what_the_template_ignores_is_refused() -> None:
    with pytest.raises(InputError, match=r"line 1: The chat template ignores tools"):
        find(tokenizer_of("end of text"), TWO_TURNS, TOOLS)
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m['content'] or '' }}", "{{ m['content'] if m['role'] == 'user' }}"
    )
    with pytest.raises(InputError, match="ignores the text of the last response"):
        find(tokenizer, TWO_TURNS)
