"""Prompts that contain a benchmark's question."""

import json
from pathlib import Path

import pytest

from tests.helpers.prompts import REAL_DATA
from tsdkd.errors import InputError
from tsdkd.stages.data.prompts import Prompt, Prompts
from tsdkd.stages.doctor.benchmark_overlap import Question, QuestionIndex, check_overlaps, read_questions

LONG = "A farmer has twelve hens and each hen lays one egg a day; how many eggs are there after two weeks of rain?"


def ask(text: object) -> Prompt:
    return Prompt("p", "", [{"role": "user", "content": text}], location="prompts.jsonl, line 1")


def test_questions_are_found_whole_or_by_thirteen_words() -> None:
    questions = [LONG, "What is seven times two?", "Name a tree.", LONG.replace("hens", "ducks")]
    index = QuestionIndex([Question("gsm8k", text) for text in questions])
    assert (len(index.questions), index.uncompared) == (3, 1)  # "Name a tree" would be found anywhere
    whole = index.find(ask(f"Solve this.\n{LONG.upper()}\nThink first."))
    assert whole is not None
    assert (whole.fraction, whole.question, whole.location) == (1.0, LONG, "prompts.jsonl, line 1")
    part = index.find(ask("of one egg a day; how many eggs are there after two weeks of rain and sun"))
    assert part is not None
    assert 0 < part.fraction < 1
    short = index.find(ask([{"type": "text", "text": "Hello: what is SEVEN, times two? Explain."}]))
    assert short is not None
    assert short.question == "What is seven times two?"
    for other in ("What is seven times three?", "how many eggs are there after two weeks of rain", "Name a tree.", ""):
        assert index.find(ask(other)) is None


def test_questions_of_evaluated_splits_are_read(rows: Path) -> None:
    """Not the shots; ifeval is evaluated on its split train."""
    questions = read_questions(rows)
    by_benchmark = {
        name: [q.text for q in questions if q.benchmark == name] for name in ("gsm8k", "sciq", "mbpp", "ifeval")
    }
    assert [len(texts) for texts in by_benchmark.values()] == [6, 6, 4, 2]
    assert by_benchmark["gsm8k"][1] == "What is 1 times 2?"
    assert by_benchmark["mbpp"][0] == "Write a function to add 0."


def test_datasets_without_a_card_are_read_by_the_names_of_their_files(tmp_path: Path) -> None:
    (tmp_path / "gsm8k" / "main").mkdir(parents=True)
    for name in ("test-00000", "train-00000"):
        (tmp_path / "gsm8k" / "main" / f"{name}.jsonl").write_text(json.dumps({"question": f"{name} asks"}) + "\n")
    assert read_questions(tmp_path) == [Question("gsm8k", "test-00000 asks")]


@pytest.mark.parametrize(
    "configs",
    [
        *("null", "5", "[1]", "[{data_files: 5}]", "[{data_files: [5]}]", "2024-99-99", "[", "\xff"),
        *("[{data_files: [{split: test}]}]", "[{data_files: [{split: test, path: [5, '']}]}]"),
        *("[{data_files: [{split: test, path: /*}]}]", "[{data_files: [{split: test, path: ../*.jsonl}]}]"),
    ],
)
def test_a_card_that_names_no_files_of_its_own_is_not_followed(configs: str, tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    for file in ("gsm8k/test.jsonl", "other.jsonl"):
        (tmp_path / file).write_text(json.dumps({"question": file}) + "\n")
    (tmp_path / "gsm8k" / "README.md").write_bytes(f"---\nconfigs: {configs}\n---\n".encode("latin-1"))
    assert read_questions(tmp_path) == [Question("gsm8k", "gsm8k/test.jsonl")]


def test_directories_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no benchmark"):
        read_questions(tmp_path)
    (tmp_path / "math").mkdir()
    with pytest.raises(InputError, match="math has no question"):
        read_questions(tmp_path)
    (tmp_path / "math" / "test.jsonl").write_text('{"question": "What?"}\n')
    with pytest.raises(InputError, match="no column 'problem'"):
        read_questions(tmp_path)


def test_the_finding_counts_and_lists_prompts() -> None:
    index = QuestionIndex([Question("gsm8k", LONG)])
    assert check_overlaps(index, [], 5).status == "ok"
    whole = index.find(ask(LONG))
    assert whole is not None
    found = check_overlaps(index, [whole], 5)
    assert found.status == "look"
    assert "1 of 5 prompts share 13 words" in found.reason
    assert "prompts.jsonl, line 1 (gsm8k, 100%)" in found.reason
    assert found.values["overlaps"][0]["prompt_id"] == "p"


@pytest.mark.skipif(not (REAL_DATA / "benchmarks").is_dir(), reason="needs the real data")
def test_real_prompts_that_were_cleaned_do_not_overlap_and_test_questions_do() -> None:
    index = QuestionIndex(read_questions(REAL_DATA / "benchmarks"))
    assert len({question.benchmark for question in index.questions}) == 10
    prompts = Prompts(REAL_DATA / "prompts" / "train.parquet", limit=500)
    assert not [overlap for prompt in prompts if (overlap := index.find(prompt))]
    question = next(q for q in index.questions if q.benchmark == "gsm8k")
    found = index.find(ask(f"Solve the following problem.\n{question.text}"))
    assert found is not None
    assert found.fraction == 1
