"""Prompts files in every format and datasets; the errors for malformed ones."""

import datetime
import json
import os
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tsdkd.errors import InputError
from tsdkd.stages.data.prompts import Prompt, Prompts


def read(file: Path, **options: object) -> list[Prompt]:
    return list(Prompts(file, **options))


ROWS = [{"prompt": "one", "source": "a"}, {"prompt": "two", "source": "b"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_reads_the_same(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"p{suffix}"
    if suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    elif suffix == ".json":
        file.write_text(json.dumps(ROWS))
    elif suffix == ".csv":
        file.write_text("prompt,source\none,a\ntwo,b\n")
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), file)
    assert [(p.messages, p.source) for p in read(file)] == [
        ([{"role": "user", "content": "one"}], "a"),
        ([{"role": "user", "content": "two"}], "b"),
    ]


def test_messages_precede_prompt_and_ids_are_kept(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"messages": messages, "prompt": "ignored", "prompt_id": 7}))
    (prompt,) = read(file)
    assert (prompt.prompt_id, prompt.messages, prompt.source) == ("7", messages, "p")


def test_ids_depend_on_content_and_repeats_are_skipped(tmp_path: Path) -> None:
    for name, texts in (("a", ["x", "y", "x"]), ("b", ["y", "x"])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    a, b = (read(tmp_path / f"{name}.jsonl") for name in "ab")
    assert [p.prompt_id for p in a] == [p.prompt_id for p in reversed(b)]
    assert len(a) == 2


def test_unicode_line_separators_and_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    text = "one\u2028two\x85three"
    file.write_text("\ufeff" + json.dumps({"prompt": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read(file)[0].messages[0]["content"] == text
    file.write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(InputError, match="not UTF-8"):
        read(file)


def test_limit(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps(ROWS))
    assert len(read(file, limit=1)) == 1


@pytest.mark.parametrize(
    ("name", "text", "column", "cause", "remedy"),
    [
        ("p.jsonl", None, None, "prompts file", "Check the path"),
        ("p.jsonl", "", None, "holds no prompts", "Add rows"),
        ("p.json", "[]", None, "holds no prompts", "Add rows"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', None, "line 2: not JSON", "Correct the line"),
        ("p.jsonl", '{"prompt": "a"}\n[1]', None, "line 2: not a JSON object", "named fields"),
        ("p.json", '[{"prompt": "a"},\n {"prompt": }]', None, "line 2: not JSON", "Correct"),
        ("p.jsonl", '{"question": "a", "id": 1}', None, "'messages' or 'prompt'", "question, id"),
        ("p.csv", "question,answer\na,b\n", "text", "column 'text'", "question, answer"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}', None, "line 2: 'prompt' is neither", "Correct the row"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}', None, "line 1: 'messages' is neither", "role and content"),
        ("p.jsonl", '{"prompt": "a", "prompt_id": 1}\n{"prompt": "b", "prompt_id": 1}', None, "two prompts", "unique"),
        ("p.parquet", "not parquet", None, "not a readable Parquet", "Check the file"),
        ("p.csv", "id,prompt\n1,a\n2,Hello, there\n", None, "line 3: the line does not have", "quote cells"),
        ("p.csv", "id,prompt\n1,a\n2\n", None, "line 3: the line does not have the 2 cells", "Correct the line"),
        ("p.csv", 'id,prompt\n1,"Hello\n2,b\n', None, "not readable as CSV", ".jsonl"),
        ("p.csv", 'id,prompt\n1,"a\n\nb"\n2,"x"y\n', None, "line 5: not readable as CSV", ".jsonl"),
        ("p.csv", "prompt,prompt\na,b\n", None, "has the column 'prompt' twice", "Rename"),
        ("p.csv", "a,b\n1,2\n", None, "'messages' or 'prompt'", "a, b"),
        ("p.jsonl", '{"id": 1}\n{"text": "a"}\n', None, "'messages' or 'prompt'", "id, text"),
        ("p.jsonl", '\n{"prompt": "a"}\n\n{"prompt": 3}', None, "line 4: 'prompt' is neither", "Correct the row"),
        ("p.json", '[{"prompt": "a"}, {"prompt": 3}]', None, "row 2: 'prompt' is neither", "Correct the row"),
        ("p.csv", 'messages\n"[{\'role\': \'user\'}]"\n', None, "line 2: 'messages' is text, but not", "json.dumps"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}', None, "line 2: the key 'prompt'", "Remove"),
        ("p.json", '[{"prompt": "a"}, {"x": {"k": 1, "k": 2}}]', None, "row 2: the key 'k' occurs twice", "Remove"),
        ("p.jsonl", '[{"prompt": "a"}]', None, "holds a JSON list", "Rename it to .json"),
        ("p.json", '{"prompt": "a"}\n{"prompt": "b"}\n', None, "one JSON object per line", "Rename it to .jsonl"),
        ("p.json", '[{"prompt": "a"}, "b"]', None, "row 2: not a JSON object", "named fields"),
        ("p.jsonl", '{"prompt": "a"}\n' + "[" * 100_000, None, "line 2: not JSON (maximum recursion", "Correct"),
        ("p.jsonl", '{"prompt": "a", "n": ' + "9" * 5000 + "}", None, "line 1: not JSON (Exceeds", "Correct"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n', None, "line 2: not UTF-8", "UTF-8"),
        ("p.csv", b"prompt\ncaf\xe9\n", None, "line 2: not UTF-8", "UTF-8"),
        ("p.json", b'[{"prompt":\n"caf\xe9"}]', None, "line 2: not UTF-8", "UTF-8"),
        ("p" * 300 + ".jsonl", None, None, "cannot be read (File name too long", "Check the path"),
        ("p.txt", "a", None, "neither a prompts file nor a dataset", ".jsonl"),
    ],
)  # fmt: skip
def test_malformed_files_are_refused(
    tmp_path: Path, name: str, text: str | bytes | None, column: str | None, cause: str, remedy: str
) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        read(tmp_path / name, column=column)
    assert cause in caught.value.cause
    assert remedy in caught.value.remedy or remedy in caught.value.cause


def test_a_pipe_and_an_unreadable_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "p.jsonl")
    with pytest.raises(InputError, match="not a regular file"):
        read(tmp_path / "p.jsonl")
    (tmp_path / "q.jsonl").write_text('{"prompt": "a"}\n')

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"q\.jsonl cannot be read \(Permission denied\)"):
        read(tmp_path / "q.jsonl")


def test_cells_of_any_length_are_read(tmp_path: Path) -> None:
    text = "x y " * 50_000
    (tmp_path / "p.csv").write_text(f"prompt\n{text}\nshort\n")
    assert [p.messages[0]["content"] for p in read(tmp_path / "p.csv")] == [text, "short"]


MISSING = {
    "p.jsonl": '{"messages": null, "prompt": "a", "prompt_id": null}\n{"messages": [], "prompt": "b"}\n'
    '{"messages": [{"role": "user", "content": "c"}], "prompt": "other", "prompt_id": 0}\n{"prompt": NaN}\n',
    "p.csv": 'messages,prompt,prompt_id\n,a,\n[],b,\n"[{""role"": ""user"", ""content"": ""c""}]",other,0\n,,\n',
}


@pytest.mark.parametrize("name", MISSING)
def test_a_row_without_messages_is_read_from_its_prompt(tmp_path: Path, name: str) -> None:
    """An empty cell is no prompt and no id in any format; 0 is an id."""
    (tmp_path / name).write_text(MISSING[name])
    skipped = Counter[str]()
    prompts = list(Prompts(tmp_path / name).read(skipped))
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["a", "b", "c"]
    assert [len(prompt.prompt_id) for prompt in prompts] == [16, 16, 1]
    assert skipped == {"empty": 1}


def test_line_ends_and_nul_characters_are_kept(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbfprompt,,\r\na\0b,,\r\n\r\nc,,\r\n")
    (tmp_path / "p.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a\\u0000b"}\r\n\r\n{"prompt": "c"}\r\n')
    assert [p.messages for p in read(tmp_path / "p.csv")] == [p.messages for p in read(tmp_path / "p.jsonl")]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (pa.array(["a", None], pa.large_string()), ["a"]),
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
        (pa.array([b"caf\xc3\xa9"]), ["caf\xe9"]),
        (pa.array([b"a", b"caf\xe9"]), "row 2: 'prompt' is neither"),
        (pa.array([1]), "row 1: 'prompt' is neither"),
        (pa.array([0], pa.timestamp("ms")), "row 1: 'prompt' is neither"),
        (pa.array([[{"role": "user", "content": "a", "at": datetime.date(2026, 1, 1)}]]), "row 1: the row contains a"),
    ],
)
def test_columns_of_parquet_files_hold_text(tmp_path: Path, cells: pa.Array, expected: list[str] | str) -> None:
    """Text in any encoding of the format is read; other types are refused. Columns without a meaning are not read."""
    unused = pa.array([1] * len(cells), pa.timestamp("ns"))
    pq.write_table(pa.table({"prompt": cells, "unused": unused}), tmp_path / "p.parquet")
    if isinstance(expected, list):
        assert [p.messages[0]["content"] for p in read(tmp_path / "p.parquet")] == expected
    else:
        with pytest.raises(InputError, match=expected):
            read(tmp_path / "p.parquet")


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    """`save_to_disk` writes one dataset, or several splits, of which one is named."""
    datasets.disable_progress_bars()
    splits = {name: datasets.Dataset.from_dict({"prompt": [name]}) for name in ("train", "test")}
    splits["test"].save_to_disk(tmp_path / "one")
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "one")[0].messages[0]["content"] == "test"
    assert [read(tmp_path / "two", split=split)[0].messages[0]["content"] for split in (None, "test")] == [*splits]
    with pytest.raises(InputError, match=r"no split 'dev'\. .*train, test"):
        read(tmp_path / "two", split="dev")
    with pytest.raises(InputError, match="no configurations"):
        read(tmp_path / "one", config_name="main")


def test_a_cache_that_cannot_be_written_is_named(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(InputError, match=r"cache of datasets cannot be written .* Set HF_HOME"):
        read(dataset, column="instruction")


def test_empty_and_repeated_prompts_are_skipped_and_counted(tmp_path: Path) -> None:
    """Empty: blank text, no messages, only an assistant message. Repeated: the same messages, whatever the id."""
    rows = [
        {"prompt": "a", "prompt_id": 1},
        {"prompt": " "},
        {"prompt": None},
        {"prompt": []},
        {"prompt": [{"role": "assistant", "content": "hi"}]},
        {"prompt": "a", "prompt_id": 2},
        {"prompt": [{"role": "user", "content": "a"}]},
        {"prompt": "b"},
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    skipped = Counter[str]()
    prompts = list(Prompts(file).read(skipped))
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["a", "b"]
    assert skipped == {"empty": 4, "duplicate": 2}


def test_assistant_messages_at_the_end_are_removed(tmp_path: Path) -> None:
    """As in datasets for fine-tuning: the prompt ends with the last user message."""
    turns = [{"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("user", "r"))]
    file = tmp_path / "p.json"
    file.write_text(json.dumps([{"messages": [*turns, {"role": "assistant", "content": "b"}]}]))
    assert read(file)[0].messages == turns


def test_the_system_message_completes_prompts_and_leaves_ids_unchanged(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "u"}]
    file = tmp_path / "p.json"
    file.write_text(json.dumps([{"messages": [{"role": "user", "content": "u"}]}, {"messages": own}]))
    plain, completed = read(file), read(file, system="think")
    assert [prompt.prompt_id for prompt in plain] == [prompt.prompt_id for prompt in completed]
    assert completed[0].messages == [{"role": "system", "content": "think"}, {"role": "user", "content": "u"}]
    assert completed[1].messages == own


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """The layout of UltraInteract on the hub: several columns, and the rows of one split in several files."""
    path = tmp_path / "ultra"
    (path / "data").mkdir(parents=True)
    for i in range(2):
        rows = [{"task": "Math", "instruction": f"question {n}", "response": "x"} for n in (2 * i, 2 * i + 1, 0)]
        pq.write_table(pa.Table.from_pylist(rows), path / "data" / f"train-{i:05d}-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist([{"instruction": "t"}]), path / "data" / "test-00000-of-00001.parquet")
    return path


def test_a_dataset_reads_like_a_file(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    skipped = Counter[str]()
    prompts = list(Prompts(dataset, column="instruction").read(skipped))
    assert [prompt.messages[0]["content"] for prompt in prompts] == [f"question {n}" for n in range(4)]
    assert {prompt.source for prompt in prompts} == {"ultra"}
    assert skipped == {"duplicate": 2}
    assert len(read(dataset, column="instruction", split="test")) == 1
    parents = [Prompts(dataset, column="instruction", limit=n).parent(tmp_path / "out") for n in (3, 3, 4)]
    assert [parent.kind for parent in parents] == ["dataset"] * 3
    assert parents[0] == parents[1] != parents[2]


@pytest.mark.parametrize(
    ("more", "cause", "remedy"),
    [
        ({"split": "validation"}, "validation", "--split"),
        ({"config_name": "other"}, "other", "--config-name"),
        ({}, "has no column 'messages' or 'prompt'", "task, instruction, response"),
    ],
)
def test_a_missing_split_configuration_or_column_is_named(
    dataset: Path, more: dict[str, str], cause: str, remedy: str
) -> None:
    with pytest.raises(InputError) as caught:
        read(dataset, **more)
    assert cause in caught.value.cause
    assert remedy in caught.value.remedy


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(InputError, match="is a file"):
        read(tmp_path / "p.jsonl", split="train")


def test_rows_are_read_on_demand(tmp_path: Path) -> None:
    """Rows after the last prompt that is used are not read."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\nno JSON\n')
    assert len(read(tmp_path / "p.jsonl", limit=1)) == 1
    assert next(iter(Prompts(tmp_path / "p.jsonl"))).messages[0]["content"] == "a"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_an_endless_line_is_refused_before_it_is_in_memory(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"p{suffix}"
    with file.open("wb") as sparse:
        sparse.truncate(1 << 36)
    with pytest.raises(InputError, match=r"line 1: longer than 67,108,864 characters"):
        list(Prompts(file))
