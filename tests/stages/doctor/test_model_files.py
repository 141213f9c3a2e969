"""Findings from the files of two models."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.models import byte_tokenizer, save_tiny_model
from tsdkd.errors import InputError
from tsdkd.stages.doctor import model_files as checks
from tsdkd.stages.doctor.model_files import ModelFiles, read_model_files

Pair = tuple[ModelFiles, ModelFiles]


@pytest.fixture
def pair(student: Path, teacher: Path) -> Pair:
    return read_model_files("student", str(student), None), read_model_files("teacher", str(teacher), None)


def edit_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | changes))


def changed(model: ModelFiles, **changes: Any) -> ModelFiles:
    """A model with another spec."""
    return replace(model, spec=replace(model.spec, **changes))


def test_a_teacher_that_is_not_larger_is_named(pair: Pair) -> None:
    assert checks.check_models(pair).status == "ok"
    swapped = checks.check_models((pair[1], pair[0]))
    assert (swapped.status, "swapped" in swapped.remedy) == ("look", True)


def test_tokenizers_that_differ_by_one_added_token(pair: Pair, other_family: Path) -> None:
    assert checks.check_tokenizer(pair).values == {"tokens": 258}
    larger = read_model_files("teacher", str(other_family), None)
    with pytest.raises(InputError, match=r"1 ids differ, first 258 \(None against '<\|tool\|>'\)") as refusal:
        checks.check_tokenizer((pair[0], larger))
    assert refusal.value.remedy.endswith("save the student's tokenizer in the teacher's directory.")


def test_padded_vocabularies_are_compared_on_the_shared_ids(pair: Pair) -> None:
    found = checks.check_vocabulary(pair)
    assert found.status == "ok"
    assert found.values == {"tokenizer": 258, "shared": 258, "student_rows": 264, "teacher_rows": 272}


def test_added_tokens_without_a_row_are_counted(tmp_path: Path, pair: Pair) -> None:
    short = save_tiny_model(tmp_path / "short", seed=1, padding_rows=-1, extra=("<|padding|>",))
    found = checks.check_vocabulary((read_model_files("student", str(short), None), pair[1]))
    assert found.status == "look"
    assert "1 added tokens have no row" in found.reason


def test_whether_each_model_can_stop(pair: Pair, tmp_path: Path) -> None:
    """A base model ends with another token than the chat template's turns."""
    assert checks.check_end_tokens(pair[0]).status == "ok"
    base = changed(pair[0], end_ids=[3])
    found = checks.check_end_tokens(base)
    assert (found.status, found.values["turn_end_ids"]) == ("ok", [257])
    assert "ends a turn with <|end|> (257), but" in found.reason
    assert checks.check_end_tokens(changed(pair[0], end_ids=[])).status == "ok"
    plain = byte_tokenizer()
    plain.chat_template = "{{ messages[0]['content'] }}"
    assert checks.check_end_tokens(changed(pair[0], tokenizer=plain, end_ids=[])).status == "stop"
    assert checks.check_same_end(pair).status == "ok"
    apart = checks.check_same_end((base, pair[1]))
    assert (apart.status, apart.values) == ("ok", {"student": [3], "teacher": [257]})
    capital = byte_tokenizer()
    capital.add_tokens("<|EOT|>")
    spelled = checks.check_same_end((changed(pair[0], tokenizer=capital, end_ids=[258]), pair[1]))
    assert "share no end token. Only the student ends with <|EOT|> (258) and only the teacher" in spelled.reason


def test_a_padding_token_that_is_an_end_token_is_named(pair: Pair) -> None:
    found = checks.check_pad_token(pair[0])
    assert (found.status, found.values) == ("ok", {"pad": 257, "pad_is_end": True})
    assert checks.check_pad_token(changed(pair[0], end_ids=[3])).values["pad_is_end"] is False
    without = byte_tokenizer()
    without.pad_token = None
    assert checks.check_pad_token(changed(pair[0], tokenizer=without)).values == {"pad": None, "pad_is_end": False}


def save_changed(source: Path, target: Path, change: Any) -> ModelFiles:
    """A copy of a model, whose matrices are changed."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    save_file(
        {k: change(v) if v.ndim == 2 else v for k, v in tensors.items()}, target / "model.safetensors", {"format": "pt"}
    )
    return read_model_files("teacher", str(target), None)


def four_bit(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, rounded to 16 values in each group of 32."""
    groups = matrix[:, :32]
    scale = groups.abs().amax(-1, keepdim=True) / 7.5
    rounded = ((groups / scale - 0.5).round() + 0.5) * scale
    return torch.cat([rounded.to(torch.bfloat16).float(), matrix[:, 32:]], 1)


def test_a_teacher_of_lower_precision(pair: Pair, teacher: Path, tmp_path: Path) -> None:
    student = pair[0]
    assert checks.check_precision(pair[1], student, "auto").status == "ok"
    narrow = save_changed(teacher, tmp_path / "narrow", lambda matrix: matrix.to(torch.float16))
    found = checks.check_precision(narrow, student, "auto")
    assert (found.status, found.values["saved"]) == ("look", "float16")
    assert "precision is below the student's (float32)" in found.reason
    assert "Loading lowers their precision." in checks.check_precision(pair[1], student, "bfloat16").reason


def test_a_teacher_that_was_converted_from_4_bits(pair: Pair, teacher: Path, tmp_path: Path) -> None:
    """Neither its config nor its precision shows it."""
    found = checks.check_precision(save_changed(teacher, tmp_path / "four", four_bit), pair[0], "auto")
    assert found.status == "look"
    assert found.values["from_4_bits"] > 0.8
    assert "like 4-bit weights" in found.reason
    eight = save_changed(teacher, tmp_path / "eight", lambda m: (m / m.abs().max() * 127).round() * m.abs().max() / 127)
    assert checks.check_precision(eight, pair[0], "auto").values["from_4_bits"] == 0


def test_a_quantised_teacher_is_named_by_its_method(pair: Pair, teacher: Path, tmp_path: Path) -> None:
    save_changed(teacher, tmp_path / "q", lambda matrix: matrix)
    edit_json(tmp_path / "q" / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    found = checks.check_precision(read_model_files("teacher", str(tmp_path / "q"), None), pair[0], "auto")
    assert (found.status, found.values["quantization"]) == ("look", "gptq")
