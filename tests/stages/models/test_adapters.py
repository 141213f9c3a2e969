"""A LoRA adapter in place of a model: base and adapter are found, loaded and fingerprinted together."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.helpers.prompts import write_prompts
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.adapters import vllm_max_lora_rank
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.record import model_record
from tsdkd.stages.models.spec import load_spec


def save_adapter(base: Path, path: Path, *, seed: int = 0, rank: int = 4) -> Path:
    """An adapter that changes what its base says."""
    torch.manual_seed(seed)
    settings = LoraConfig(r=rank, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def adapter(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(student, tmp_path_factory.mktemp("adapter") / "a")


def test_an_adapter_is_read_with_its_base(student: Path, adapter: Path) -> None:
    base, tuned = load_model(str(student)), load_model(str(adapter))
    ids = torch.arange(8).unsqueeze(0)
    merged = AutoModelForCausalLM.from_pretrained(student)
    from peft import PeftModel

    merged = PeftModel.from_pretrained(merged, adapter).merge_and_unload()
    with torch.no_grad():
        found = tuned.model(ids).logits
        torch.testing.assert_close(found, merged(ids).logits, rtol=1e-4, atol=1e-5)
        assert (found - base.model(ids).logits).abs().max() > 0.1
    head = tuned.head.logits(tuned.hidden(ids, torch.ones_like(ids)))
    torch.testing.assert_close(head, found[..., :258], rtol=1e-4, atol=1e-5)


def test_its_outline_is_the_bases(student: Path, adapter: Path) -> None:
    found = load_spec(str(adapter))
    assert (found.directory, found.adapter) == (student, adapter)
    reader = load_model(str(student))
    assert (found.end_ids, found.context, found.dtype) == (reader.end_ids, reader.context, "float32")
    assert vllm_max_lora_rank(adapter) == 8


def test_the_fingerprint_covers_both(student: Path, adapter: Path, tmp_path: Path) -> None:
    """The same adapter over moved weights is the same; over other weights, or another adapter, it is not."""
    one = model_record("student", str(adapter))
    base = tmp_path / "base"
    shutil.copytree(student, base)
    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    settings = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    same = model_record("student", str(moved))
    assert (same.weights, same.tokenizer, same.chat_template) == (one.weights, one.tokenizer, one.chat_template)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight.data[0, 0] += 1e-3
    model.save_pretrained(base)
    assert model_record("student", str(moved)).weights != one.weights
    other = save_adapter(student, tmp_path / "other", seed=1)
    assert len({model_record("student", str(path)).weights for path in (student, adapter, other)}) == 3


def test_it_answers(student: Path, adapter: Path, tmp_path: Path) -> None:
    prompts, config = write_prompts(tmp_path / "p.jsonl", 4), GenerateConfig(max_new_tokens=8, temperature=0)
    tuned = generate(prompts, str(adapter), tmp_path / "a", config).table()
    assert tuned["response_ids"] != generate(prompts, str(student), tmp_path / "b", config).table()["response_ids"]


def test_what_is_no_lora_adapter_is_refused(tmp_path: Path) -> None:
    for text, cause in (
        ('{"peft_type": "PREFIX_TUNING", "base_model_name_or_path": "x"}', "not LORA"),
        ("{", "cannot be read"),
        ("{}", "cannot be read"),
    ):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(InputError, match=cause):
            model_record("student", str(tmp_path))
