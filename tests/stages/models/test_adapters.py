"""LoRA adapters named in place of a model: adapter and base model are loaded and fingerprinted together."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.adapters import save_adapter
from tests.helpers.prompts import write_prompts
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.adapters import vllm_max_lora_rank
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.record import model_record
from tsdkd.stages.models.spec import load_spec


@pytest.fixture(scope="session")
def adapter(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(student, tmp_path_factory.mktemp("adapter") / "a")


def test_an_adapter_is_loaded_with_its_base_model(student: Path, adapter: Path) -> None:
    base, tuned = load_model(str(student)), load_model(str(adapter))
    ids = torch.arange(8).unsqueeze(0)
    merged = AutoModelForCausalLM.from_pretrained(student)
    from peft import PeftModel

    merged = PeftModel.from_pretrained(merged, adapter).merge_and_unload()
    with torch.no_grad():
        logits = tuned.model(ids).logits
        torch.testing.assert_close(logits, merged(ids).logits, rtol=1e-4, atol=1e-5)
        assert (logits - base.model(ids).logits).abs().max() > 0.1
    head = tuned.head.logits(tuned.hidden(ids, torch.ones_like(ids)))
    torch.testing.assert_close(head, logits[..., :258], rtol=1e-4, atol=1e-5)


def test_its_spec_is_the_base_models(student: Path, adapter: Path) -> None:
    spec = load_spec(str(adapter))
    assert (spec.directory, spec.adapter) == (student, adapter)
    base = load_model(str(student))
    assert (spec.end_ids, spec.context, spec.dtype) == (base.end_ids, base.context, "float32")
    assert vllm_max_lora_rank(adapter) == 8


def test_the_fingerprint_covers_adapter_and_base_model(student: Path, adapter: Path, tmp_path: Path) -> None:
    """It ignores where the base model lies; other weights or another adapter change it."""
    original = model_record("student", str(adapter))
    base = tmp_path / "base"
    shutil.copytree(student, base)
    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    settings = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    assert replace(model_record("student", str(moved)), name=original.name) == original
    model = AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight.data[0, 0] += 1e-3
    model.save_pretrained(base)
    assert model_record("student", str(moved)).weights != original.weights
    other = save_adapter(student, tmp_path / "other", seed=1)
    assert len({model_record("student", str(path)).weights for path in (student, adapter, other)}) == 3


def test_an_adapter_samples_other_responses_than_its_base_model(student: Path, adapter: Path, tmp_path: Path) -> None:
    prompts, config = write_prompts(tmp_path / "p.jsonl", 4), GenerateConfig(max_new_tokens=8, temperature=0)
    tuned = generate(prompts, str(adapter), tmp_path / "a", config).table()
    assert tuned["response_ids"] != generate(prompts, str(student), tmp_path / "b", config).table()["response_ids"]


def test_other_adapters_are_refused(tmp_path: Path) -> None:
    for text, cause in (
        ('{"peft_type": "PREFIX_TUNING", "base_model_name_or_path": "x"}', "not LORA"),
        ("{", "cannot be read"),
        ("{}", "cannot be read"),
    ):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(InputError, match=cause):
            model_record("student", str(tmp_path))


def test_a_relative_base_is_found_from_every_directory(
    student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the adapter or above it, never another model of that name in the working directory."""
    shutil.copytree(student, tmp_path / "project/models/base")
    adapter = save_adapter(student, tmp_path / "project/out/adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "models/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(teacher, elsewhere / "models/base")
    monkeypatch.chdir(elsewhere)
    assert load_spec(str(adapter)).directory == tmp_path / "project/models/base"
    shutil.copytree(teacher, tmp_path / "models/base")
    with pytest.raises(InputError, match=r"both .*models/base and .*models/base match"):
        load_spec(str(adapter))
    moved = shutil.move(adapter, tmp_path.parent / f"{tmp_path.name}-moved")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"The base model of .* is missing.*base_model_name_or_path"):
        load_spec(str(moved))


def test_the_revision_of_a_hub_model_is_loaded(
    student: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    hub = {"base_model_name_or_path": "org/model", "revision": "0a1b2c"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | hub))
    revisions = []

    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        revisions.append((name, revision))
        return str(student)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert load_spec(str(tmp_path)).directory == student
    assert set(revisions) == {("org/model", "0a1b2c")}


def test_an_adapter_beside_a_config_is_an_adapter_but_not_beside_a_model(
    student: Path, adapter: Path, tmp_path: Path
) -> None:
    """transformers loads the adapter in both cases, and other libraries the model."""
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    shutil.copy(student / "config.json", tmp_path)
    assert load_spec(str(tmp_path)).adapter == tmp_path
    shutil.copy(student / "model.safetensors", tmp_path)
    with pytest.raises(InputError, match="holds an adapter and a whole model"):
        load_spec(str(tmp_path))
