"""Adapters: they alone are trained, peft loads them, and one on the output head is part of the objective."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.helpers.training import CONFIG, cut, metrics, same_update, weights
from tsdkd.errors import InputError
from tsdkd.stages.config.train import LoRAConfig, TrainConfig
from tsdkd.stages.models.language_model import output_head
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.new_adapters import add_lora
from tsdkd.stages.models.record import model_record
from tsdkd.stages.train.stage import train_offline

Contents = Callable[[Path], dict[str, bytes]]
LORA = replace(CONFIG, lora=LoRAConfig(rank=4, alpha=8), learning_rate=1e-2)
PROBE = torch.arange(3, 13).unsqueeze(0)


def adapt(run: Path, student: Path, output: Path, config: TrainConfig = LORA) -> Path:
    train_offline(run / "rollouts", run / "scores", str(student), output, config)
    return output


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(PROBE).logits


def test_an_adapter_is_saved_and_peft_loads_it(run: Path, student: Path, tmp_path: Path) -> None:
    checkpoint = adapt(run, student, tmp_path / "c")
    base = AutoModelForCausalLM.from_pretrained(student)
    before = logits(base)
    loaded = PeftModel.from_pretrained(base, checkpoint)
    assert (logits(loaded) - before).abs().max() > 1e-2
    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in saved} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert not (checkpoint / "model.safetensors").exists()
    first, *_, last = metrics(checkpoint)
    assert last["loss"] < first["loss"]


def test_an_adapter_is_loaded_with_the_base_that_it_was_trained_on(
    run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names its base by an absolute path, and refuses other weights there."""
    shutil.copytree(student, tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    checkpoint = adapt(run, Path("student"), tmp_path / "c")
    settings = json.loads((checkpoint / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "student")
    load_model(str(checkpoint))
    model = AutoModelForCausalLM.from_pretrained(student)
    model.lm_head.weight.data[0, 0] += 1e-3
    model.save_pretrained(tmp_path / "student")
    for use in (load_model, partial(model_record, "student")):
        with pytest.raises(InputError, match="other weights than the student that the adapter"):
            use(str(checkpoint))


def test_merged_weights_are_the_adapted_model(run: Path, student: Path, tmp_path: Path) -> None:
    adapted = adapt(run, student, tmp_path / "adapter")
    merged = adapt(run, student, tmp_path / "merged", replace(LORA, lora=replace(LORA.lora, merge=True)))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student), adapted)
    assert torch.allclose(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(merged)), atol=1e-4)
    assert set(weights(merged)) == set(weights(student))


def test_base_weights_are_not_trained(run: Path, student: Path, tmp_path: Path) -> None:
    only = replace(LORA, lora=LoRAConfig(rank=2, targets="q_proj", merge=True))
    found, start = weights(adapt(run, student, tmp_path / "c", only)), weights(student)
    moved = {name for name in start if not torch.equal(found[name], start[name])}
    assert moved == {name for name in start if "q_proj" in name}


def test_an_adapter_on_the_head_is_part_of_the_objective(student: Path) -> None:
    learner = load_model(str(student))
    learner = add_lora(learner, LoRAConfig(rank=4, targets="lm_head,q_proj"), seed=0)
    layer = learner.model.get_output_embeddings()
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    head = output_head(learner.model, None)
    hidden = learner.hidden(PROBE, torch.ones_like(PROBE))
    assert torch.allclose(head.logits(hidden), learner.model(PROBE).logits, atol=1e-4)
    head.logits(hidden).logsumexp(-1).sum().backward()
    for matrix in (layer.lora_A["default"], layer.lora_B["default"]):
        assert matrix.weight.grad.abs().sum() > 0
    assert layer.base_layer.weight.grad is None


def test_micro_batches_and_checkpointing_do_not_change_an_adapter(
    run: Path,
    student: Path,
    tmp_path: Path,
) -> None:
    two = load_file(adapt(run, student, tmp_path / "two") / "adapter_model.safetensors")
    config = replace(LORA, micro_batch_size=4, gradient_checkpointing=True)
    four = load_file(adapt(run, student, tmp_path / "four", config) / "adapter_model.safetensors")
    assert same_update(two, four, {name: 0 * value for name, value in two.items()})


def test_a_cut_run_ends_with_the_same_bytes(
    run: Path,
    student: Path,
    tmp_path: Path,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(LORA, lora=LoRAConfig(rank=4, dropout=0.2))
    adapt(run, student, tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        cut(patch, 3)
        with pytest.raises(RuntimeError, match="cut"):
            adapt(run, student, tmp_path / "cut", config)
    adapt(run, student, tmp_path / "cut", config)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_unusable_adapters_are_refused(run: Path, student: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no linear modules query") as caught:
        adapt(run, student, tmp_path / "c", replace(LORA, lora=LoRAConfig(targets="q_proj,query")))
    assert "down_proj, gate_proj, k_proj, lm_head" in caught.value.remedy
    with pytest.raises(InputError, match="output head"):
        adapt(run, student, tmp_path / "c", replace(LORA, lora=LoRAConfig(targets="lm_head", dropout=0.1)))
    tied = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(student, tie_word_embeddings=True))
    tied.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(student).save_pretrained(tmp_path / "tied")
    with pytest.raises(InputError, match="shares its output head"):
        adapt(run, tmp_path / "tied", tmp_path / "c", replace(LORA, lora=LoRAConfig(targets="lm_head")))
    adapter = adapt(run, student, tmp_path / "adapter")
    with pytest.raises(InputError, match=r"starts from full weights|no model"):
        adapt(run, adapter, tmp_path / "c")


def test_every_process_writes_the_same_bytes(run: Path, student: Path, tmp_path: Path, contents: Contents) -> None:
    """Every file of the checkpoint: the order of sets differs between processes."""
    here = adapt(run, student, tmp_path / "here")
    settings = json.loads((here / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(settings["target_modules"])
    script = (
        "import sys; from pathlib import Path; from tests.stages.train.test_lora import adapt;"
        "adapt(*map(Path, sys.argv[1:]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, run, student, tmp_path / "elsewhere"]
    subprocess.run([*map(str, command)], env=environment, check=True)
    assert contents(tmp_path / "elsewhere") == contents(here)
