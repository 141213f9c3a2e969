"""A checkpoint holds the student's config files and the trained weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.training import CONFIG, learn
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.errors import TsdkdError
from tsdkd.stages.config.train import LoRAConfig

GENERATION = {"temperature": 0.6, "top_p": 0.95, "early_stopping": True, "eos_token_id": [257], "unknown": 1}
"""Loads, but transformers refuses to save it: sampling without do_sample, and one beam that stops early."""
OLDER = {"max_length": 30, "use_cache": True, "torch_dtype": "float32", "transformers_version": "4.40.0"}
"""Settings of a config that transformers loads and writes otherwise, or not at all."""


@pytest.fixture
def older_student(student: Path, tmp_path: Path) -> Path:
    """The student with config files that transformers refuses to save."""
    path = shutil.copytree(student, tmp_path / "student")
    config = json.loads((path / "config.json").read_text()) | OLDER
    del config["dtype"]
    config |= config.pop("rope_parameters")
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps(GENERATION))
    return path


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2, merge=True)], ids=["full", "merged"])
def test_config_files_are_the_students_in_the_precision_of_training(
    run: Path, older_student: Path, tmp_path: Path, lora: LoRAConfig | None
) -> None:
    """Every key of config.json but the dtype, and generation_config.json byte for byte, after saved steps."""
    output = tmp_path / "checkpoint"
    learn(run, older_student, output, replace(CONFIG, precision="bfloat16", epochs=1, save_steps=1, lora=lora))
    before, after = (json.loads((path / "config.json").read_text()) for path in (older_student, output))
    assert after == before | {"torch_dtype": "bfloat16"}
    generation = [(path / "generation_config.json").read_bytes() for path in (older_student, output)]
    assert generation[0] == generation[1]


def test_an_adapter_is_saved_beside_any_generation_config(run: Path, older_student: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1, save_steps=1, lora=LoRAConfig(rank=2))
    learn(run, older_student, tmp_path / "checkpoint", config)
    assert (tmp_path / "checkpoint" / "adapter_config.json").is_file()


def test_a_checkpoint_is_complete_only_if_it_loads_as_it_was_trained(
    run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_pretrained = AutoModelForCausalLM.from_pretrained

    def loaded_with_an_error(path: Path, **options: object) -> torch.nn.Module:
        model = from_pretrained(path, **options)
        if Path(path).name == "staging.tmp":
            model.model.norm.weight.data[0] += 1
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded_with_an_error)
    with pytest.raises(TsdkdError, match=r"model\.norm\.weight differs"):
        learn(run, student, tmp_path / "checkpoint", replace(CONFIG, epochs=1))
    assert load_manifest(tmp_path / "checkpoint").state == "partial"
