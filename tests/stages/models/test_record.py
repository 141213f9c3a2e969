"""Fingerprints of models: they follow the content of the files that decide a result."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tsdkd.errors import InputError
from tsdkd.stages.models.record import model_record, require_same_template, require_same_tokenizer


def test_fingerprints_follow_content(student: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(student, copy)
    original, copied = model_record("student", str(student)), model_record("student", str(copy))
    fingerprints = (original.weights, original.tokenizer, original.chat_template)
    assert fingerprints == (copied.weights, copied.tokenizer, copied.chat_template)
    model = AutoModelForCausalLM.from_pretrained(copy)
    model.lm_head.weight.data[0, 0] += 1e-3
    model.save_pretrained(copy)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    changed = model_record("student", str(copy))
    assert changed.weights != original.weights
    assert changed.chat_template != original.chat_template
    assert changed.tokenizer == original.tokenizer


def test_tokenizers_are_compared_id_by_id(student: Path, teacher: Path, other_family: Path) -> None:
    require_same_tokenizer(model_record("student", str(student)), model_record("teacher", str(teacher)))
    with pytest.raises(InputError, match=r"258 tokens.*259.*: 1 ids differ, first 258 \(None against '<\|tool"):
        require_same_tokenizer(model_record("student", str(student)), model_record("teacher", str(other_family)))


def test_a_model_keeps_its_template_and_another_one_may_have_its_own(student: Path) -> None:
    """Another model is one of another role, as in distillation of a model by itself, or of other weights."""
    model = model_record("student", str(student))
    changed = replace(model, chat_template="0" * 64)
    require_same_template(model, model)
    require_same_template(replace(changed, role="teacher"), model)
    require_same_template(replace(changed, weights="0" * 64), model)
    with pytest.raises(InputError, match="student's chat template was changed"):
        require_same_template(changed, model)


def test_a_model_without_tokenizer_or_weights_is_refused(student: Path, tmp_path: Path) -> None:
    shutil.copy(student / "config.json", tmp_path)
    with pytest.raises(InputError, match="no tokenizer"):
        model_record("student", str(tmp_path))
    weightless = tmp_path / "weightless"
    shutil.copytree(student, weightless, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(InputError, match="has no weights"):
        model_record("student", str(weightless))
