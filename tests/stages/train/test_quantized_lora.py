"""Adapters on a quantised student: offline and online, resumed, merged; what does not work with them is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.helpers.training import CONFIG, SAMPLING, RecordingObserver, cut, metrics
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.errors import InputError
from tsdkd.stages.config.train import LoRAConfig, OnlineConfig, TrainConfig
from tsdkd.stages.models.load import load_model
from tsdkd.stages.train.stage import train_offline, train_online
from tsdkd.stages.train.trainer import DistillationTrainer

pytest.importorskip("bitsandbytes", reason="needs `pip install bitsandbytes`")
Contents = Callable[[Path], dict[str, bytes]]
QLORA = replace(CONFIG, lora=LoRAConfig(rank=4, alpha=8, quantize="4bit"), learning_rate=1e-2)
PROBE = torch.arange(3, 13).unsqueeze(0)


def adapt(run: Path, student: Path, output: Path, config: TrainConfig = QLORA) -> Path:
    train_offline(run / "rollouts", run / "scores", str(student), output, config)
    return output


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(PROBE).logits.float()


def test_the_adapter_names_the_full_weights_and_serves_on_them(run: Path, student: Path, tmp_path: Path) -> None:
    checkpoint = adapt(run, student, tmp_path / "c")
    settings = json.loads((checkpoint / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(student)
    assert not any("bit" in str(value) for value in settings.values())
    base = AutoModelForCausalLM.from_pretrained(student)
    before = logits(base)
    served = logits(PeftModel.from_pretrained(base, checkpoint))
    assert (served - before).abs().max() > 1e-2
    assert torch.allclose(logits(load_model(str(checkpoint)).model), served, atol=1e-4)
    manifest = load_manifest(checkpoint)
    assert manifest.config["lora"]["quantize"] == "4bit"
    assert "bitsandbytes" in manifest.libraries
    first, *_, last = metrics(checkpoint)
    assert last["loss"] < first["loss"]


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_cut_run_merges_the_same_bytes_which_are_the_model_that_was_trained(
    run: Path, student: Path, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch, bits: str
) -> None:
    """With held-out measurements between the steps."""
    lora = LoRAConfig(rank=4, alpha=8, quantize=bits, merge=True, dropout=0.1)
    config = replace(QLORA, lora=lora, optimizer="adamw_8bit", held_out=0.2, eval_steps=1, save_steps=1)
    trained: list[torch.Tensor] = []
    train = DistillationTrainer.train

    def train_and_read(self: DistillationTrainer, *arguments: object, **more: object) -> object:
        result = train(self, *arguments, **more)
        with self.inference_student() as model:
            trained.append(model.hidden(PROBE, torch.ones_like(PROBE)))
        return result

    with monkeypatch.context() as patched:
        patched.setattr(DistillationTrainer, "train", train_and_read)
        whole = adapt(run, student, tmp_path / "whole", config)
    with monkeypatch.context() as patched:
        cut(patched, 2)
        with pytest.raises(RuntimeError, match="cut"):
            adapt(run, student, tmp_path / "cut", config)
    adapt(run, student, tmp_path / "cut", config)
    assert contents(tmp_path / "cut") == contents(whole)
    assert "quantization_config" not in (whole / "config.json").read_text()
    with torch.no_grad():
        merged = load_model(str(whole)).hidden(PROBE, torch.ones_like(PROBE))
    assert (merged - trained[0]).norm() < 1e-4 * merged.norm()


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_sampling_and_measuring_do_not_stop_online_training(
    prompts: Path, student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: str
) -> None:
    """vLLM is installed and does not get the student; every adapter learns in every step."""
    learned: list[bool] = []
    training_step = DistillationTrainer.training_step

    def step_and_look(self: DistillationTrainer, model: torch.nn.Module, *arguments: object) -> object:
        loss = training_step(self, model, *arguments)
        learned.extend(bool(w.grad.abs().sum() > 0) for name, w in model.named_parameters() if "lora_B" in name)
        return loss

    monkeypatch.setattr(DistillationTrainer, "training_step", step_and_look)
    online = OnlineConfig(sampling=replace(SAMPLING, engine="auto"))
    lora = LoRAConfig(rank=4, quantize=bits)
    config = replace(QLORA, lora=lora, online=online, epochs=1, held_out=0.3, eval_steps=1)
    observer = RecordingObserver()
    with patch("tsdkd.stages.engines.choice.has_vllm", lambda: True):
        train_online(prompts, str(student), str(teacher), tmp_path / "c", config, observer=observer)
        explicit = replace(config, online=OnlineConfig(sampling=replace(SAMPLING, engine="vllm")))
        with pytest.raises(InputError, match="vLLM does not sample from a student with --quantize"):
            train_online(prompts, str(student), str(teacher), tmp_path / "d", explicit)
    assert "Responses are sampled from the student with transformers." in observer.messages
    assert len(learned) >= 28
    assert all(learned)


def test_quantised_weights_are_refused_under_fsdp(
    run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="FSDP cannot shard the quantised weights of --quantize"):
        adapt(run, student, tmp_path / "c")
    assert not (tmp_path / "c").exists()
