"""Messages with tool calls, parts and null contents have the ids of `apply_chat_template`, in every format."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from tests.helpers.models import byte_tokenizer
from tsdkd.errors import InputError
from tsdkd.stages.data.messages import text_messages
from tsdkd.stages.data.prompt_tokens import prompt_token_ids
from tsdkd.stages.data.prompts import Prompt, Prompts

TOOL_CHAT = (
    "{% if tools %}[tools {{ tools | tojson }}]{% endif %}{% for m in messages %}[{{ m['role'] }} "
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% elif m['content'] %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if m['name'] is defined %} by {{ m['name'] }}{% endif %}"
    "{% if m['tool_calls'] is defined %}{% for c in m['tool_calls'] %}<{{ c['function'] | tojson }}>{% endfor %}"
    "{% endif %}]{% endfor %}[assistant "
)
CALL = {"type": "function", "function": {"name": "rain", "arguments": {"town": "Ulm"}}}
OTHER_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TOOLS = [{"type": "function", "function": {"name": "rain", "parameters": {"properties": {"town": {"type": "string"}}}}}]
ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "Rain in Ulm?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "yes", "name": "rain"},
        ],
        "tools": TOOLS,
    },
    {
        "messages": [
            {"role": "user", "content": "Add."},
            {"role": "assistant", "content": "Well:", "tool_calls": [OTHER_CALL]},
            {"role": "tool", "content": "3", "name": "add"},
            {"role": "assistant", "content": "It is 3."},
        ],
        "tools": None,
    },
    {"messages": [{"role": "user", "content": "Hello"}], "tools": None},
]
PARTS = [
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Add "}, {"type": "text", "text": "3."}]}]}
]


def in_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.with_suffix(".jsonl")


def in_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.with_suffix(".json").write_text(json.dumps(rows, indent=1))
    return path.with_suffix(".json")


def in_json_text(path: Path, rows: list[dict[str, Any]]) -> Path:
    return in_jsonl(path, [{name: json.dumps(cell) for name, cell in row.items()} for row in rows])


def in_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({name: cell and json.dumps(cell) for name, cell in row.items()} for row in rows)
    return path.with_suffix(".csv")


def in_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


def saved_to_disk(path: Path, rows: list[dict[str, Any]]) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset(pa.Table.from_pylist(rows)).save_to_disk(path)
    return path


FORMATS = [in_jsonl, in_json, in_json_text, in_csv, in_parquet, saved_to_disk]
Write = Callable[[Path, list[dict[str, Any]]], Path]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOL_CHAT
    return tokenizer


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("rows", [ROWS, PARTS])
def test_prompt_ids_are_those_of_apply_chat_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, write: Write, rows: list[dict[str, Any]]
) -> None:
    """Tables pad objects with nulls, and text formats hold messages as JSON: the row has the same prompt everywhere.

    A tool call with its result is part of the prompt; the assistant's last message is not.
    """
    prompts = list(Prompts(write(tmp_path / "p", rows)))
    for prompt, row in zip(prompts, rows, strict=True):
        messages = row["messages"][:-1] if row["messages"][-1]["role"] == "assistant" else row["messages"]
        expected = tokenizer.apply_chat_template(
            messages, tools=row.get("tools"), add_generation_prompt=True, tokenize=False
        )
        assert tokenizer.decode(prompt_token_ids(tokenizer, prompt, None)) == expected
    assert [prompt.prompt_id for prompt in prompts] == [
        prompt.prompt_id for prompt in Prompts(in_jsonl(tmp_path / "same", rows))
    ]


def test_ids_of_plain_prompts_are_the_hash_of_role_and_content(tmp_path: Path) -> None:
    """They decide seeds and held-out prompts, so they never change."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hello"}\n')
    assert next(iter(Prompts(tmp_path / "p.jsonl"))).prompt_id == "64b690bea70938c2"


def test_tools_belong_to_a_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "tools": tools} for tools in (None, TOOLS, TOOLS)]
    prompts = list(Prompts(in_jsonl(tmp_path / "p", rows)))
    assert [prompt.tools for prompt in prompts] == [None, TOOLS]
    assert prompts[0].prompt_id != prompts[1].prompt_id


PLAIN_CHAT = "{% for m in messages %}[{{ m['role'] }} {{ m['content'] }}]{% endfor %}"


@pytest.mark.parametrize(
    ("row", "template", "cause"),
    [
        ({"messages": [{"role": "user", "content": None, "name": "Ann"}]}, PLAIN_CHAT, "null content as None"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, PLAIN_CHAT, "ignores tool calls"),
        ({"prompt": "a", "tools": TOOLS}, PLAIN_CHAT, "ignores tools"),
        (PARTS[0], PLAIN_CHAT, "not support contents that are lists of parts"),
        (
            PARTS[0],
            "{{ messages[0]['content'] if messages[0]['content'] is string }}",
            "ignores contents that are lists",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]},
            "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}",
            "ignores messages of the role tool",
        ),
        (
            {"messages": [{"role": "user", "content": "b"}, {"role": "system", "content": "a"}]},
            "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}",
            "ignores messages of the role system",
        ),
        ({"prompt": "a"}, "{{ messages[0]['content'] + none }}", "refuses a prompt with the roles user"),
        ({"prompt": "a"}, "{{ raise_exception('no user') }}", r"refuses a prompt with the roles user \(no user\)"),
    ],
)
def test_a_template_that_cannot_write_a_prompt_is_refused_with_its_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], template: str, cause: str
) -> None:
    tokenizer.chat_template = template
    (prompt,) = Prompts(in_jsonl(tmp_path / "p", [{"prompt": None}, row]))
    with pytest.raises(InputError, match=rf"p\.jsonl, line 2: .*{cause}"):
        prompt_token_ids(tokenizer, prompt, None)


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]}, "type image"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "a part without a type"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "a part without a type"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "text without a text"),
        ({"messages": [{"role": "user", "content": 3}]}, "content of message 1 of 'messages' is int"),
        ({"messages": [{"role": 1, "content": "a"}]}, r"role and content \(message 1\)"),
        ({"messages": ["a"]}, r"role and content \(message 1\)"),
        ({"messages": {"role": "user", "content": "a"}}, "neither text nor a list of messages"),
        ({"messages": "[{'role': 'user', 'content': 'a'}]"}, "not the JSON of a list of messages"),
        ({"prompt": "a", "tools": "hammer"}, "not a list of JSON schemas"),
        ({"prompt": "a", "tools": {"name": "f"}}, "not a list of JSON schemas"),
        ({"prompt": "a\ud83d"}, r"the unpaired surrogate \\ud83d"),
        ({"prompt": "a", "prompt_id": "\udc00"}, r"the unpaired surrogate \\udc00"),
        ({"prompt": "a", "source": "\udc00"}, r"the unpaired surrogate \\udc00"),
        ({"prompt": "a", "prompt_id": [1]}, "'prompt_id' is neither text nor a number"),
    ],
)
def test_a_malformed_prompt_is_refused_with_its_line(tmp_path: Path, row: dict[str, Any], cause: str) -> None:
    with pytest.raises(InputError, match=rf"p\.jsonl, line 2: .*{cause}"):
        list(Prompts(in_jsonl(tmp_path / "p", [{"prompt": "first"}, row])))


def test_messages_of_sharegpt_are_read_as_role_and_content(tmp_path: Path) -> None:
    """As lists and as JSON text, for every policy; other speakers are refused."""
    rows = [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "Hi?"},
        {"from": "gpt", "value": "Hello."},
        {"from": "observation", "value": "4"},
    ]
    cells = [{"conversations": rows}, {"conversations": json.dumps([*rows, rows[1]])}]
    prompts = list(Prompts(in_jsonl(tmp_path / "p", cells), column="conversations"))
    assert [(m["role"], m["content"]) for m in prompts[0].messages] == [
        ("system", "Be kind."),
        ("user", "Hi?"),
        ("assistant", "Hello."),
        ("tool", "4"),
    ]
    assert prompts[1].messages == [*prompts[0].messages, prompts[0].messages[1]]
    cell = {"messages": [{"from": "function_call", "value": "{}"}]}
    with pytest.raises(InputError, match=r"line 1: message 1 of 'messages' is from 'function_call'"):
        list(Prompts(in_jsonl(tmp_path / "p", [cell])))


def test_rollouts_keep_messages_as_text() -> None:
    """Plain messages as they are; others as the JSON of their fields."""
    plain = {"role": "user", "content": "a"}
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    recorded = text_messages([plain, call])
    assert recorded[0] == plain
    assert recorded[1]["role"] == "assistant"
    assert {"role": "assistant", **json.loads(recorded[1]["content"])} == call


def test_equality_of_prompts_ignores_their_location() -> None:
    assert Prompt("1", "s", [], location="a") == Prompt("1", "s", [], location="b")
