"""The embedded data: the files equal the script's output, no story is in two files, answers are balanced."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from tsdkd.stages.data.embedded import make

DATA = Path(make.__file__).parent


def prompts_of(name: str) -> list[str]:
    if name == "benchmark":
        return [row["prompt"] for row in pq.read_table(DATA / "benchmark.parquet").to_pylist()]
    conversations = [json.loads(line)["messages"] for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
    return [user["content"] for _, user in conversations]


def test_the_files_are_what_the_script_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "DIRECTORY", tmp_path)
    make.main()
    for name in ("prompts.jsonl", "held_out.jsonl"):
        assert (tmp_path / name).read_text() == (DATA / name).read_text()
    assert pq.read_table(tmp_path / "benchmark.parquet").equals(pq.read_table(DATA / "benchmark.parquet"))


def test_no_story_is_in_two_files() -> None:
    prompts = [prompt for name in make.SIZES for prompt in prompts_of(name)]
    assert len(prompts) == len(set(prompts)) == sum(make.SIZES.values())


def test_the_benchmark_has_the_system_message_of_the_prompts() -> None:
    task = yaml.safe_load((DATA / "benchmark.yaml").read_text())
    prompts = (DATA / "prompts.jsonl").read_text().splitlines()
    system_messages = {json.loads(line)["messages"][0]["content"] for line in prompts}
    assert system_messages == {task["description"]}


def test_the_answer_is_in_its_story_first_as_often_as_last() -> None:
    rows = pq.read_table(DATA / "benchmark.parquet").to_pylist()
    first = 0
    for row in rows:
        (other,) = set(row["choices"]) - {row["answer"]}
        assert row["answer"] in row["prompt"]
        assert other in row["prompt"]
        first += row["prompt"].index(row["answer"]) < row["prompt"].index(other)
    assert 0.4 < first / len(rows) < 0.6
