"""Optimizers by name: each trains, resumes to the same bytes and takes the planned memory; others are refused."""

import importlib.machinery
import importlib.metadata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.training import CONFIG, SAMPLING, Weights, cut, distance, learn, weights
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.errors import InputError
from tsdkd.stages.config.optimizer import OPTIMIZERS, OptimizerName
from tsdkd.stages.config.train import LoRAConfig, OnlineConfig, TrainConfig
from tsdkd.stages.models.memory import estimate_training_memory, require_memory
from tsdkd.stages.models.spec import load_config
from tsdkd.stages.train import settings
from tsdkd.stages.train.stage import train_offline, train_online
from tsdkd.stages.train.trainer import DistillationTrainer

Contents = Callable[[Path], dict[str, bytes]]
NEEDS_BITSANDBYTES = pytest.mark.skipif(
    settings.find_spec("bitsandbytes") is None, reason="needs `pip install bitsandbytes`"
)
CHOICES = ["adamw_torch", "adafactor", pytest.param("adamw_8bit", marks=NEEDS_BITSANDBYTES)]


@pytest.fixture(scope="module")
def usual(run: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """Trained by the default optimizer."""
    return learn(run, student, tmp_path_factory.mktemp("usual") / "c")


def states(monkeypatch: pytest.MonkeyPatch, checked: Callable[[DistillationTrainer], Any]) -> list[Any]:
    """What `checked` returns for each trainer after its training."""
    found: list[Any] = []
    train = DistillationTrainer.train

    def train_and_check(self: DistillationTrainer, *arguments: Any, **more: Any) -> Any:
        result = train(self, *arguments, **more)
        found.append(checked(self))
        return result

    monkeypatch.setattr(DistillationTrainer, "train", train_and_check)
    return found


def optimizer_of(trainer: DistillationTrainer) -> Any:
    return trainer.optimizer.optimizer  # inside accelerate's


def state_bytes(trainer: DistillationTrainer) -> int:
    tables = {"qmap1", "qmap2"}  # of the optimizer, not of a weight
    return sum(
        value.nbytes
        for state in optimizer_of(trainer).state.values()
        for name, value in state.items()
        if torch.is_tensor(value) and value.ndim and name not in tables
    )


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adafactor"])
def test_states_take_the_planned_memory(
    run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: OptimizerName
) -> None:
    config = replace(CONFIG, optimizer=name, epochs=0.5)
    found = states(monkeypatch, state_bytes)
    learn_any(run, student, tmp_path / "c", config)
    planned = estimate_training_memory(load_config(str(student)), (), 40, config, "float32")
    assert found == [planned.optimizer]


def learn_any(run: Path, student: Path, output: Path, config: TrainConfig) -> Path:
    train_offline(run / "rollouts", run / "scores", str(student), output, config)
    return output


@pytest.mark.parametrize("name", CHOICES)
def test_an_optimizer_moves_the_weights_about_as_adamw(
    run: Path, student: Path, tmp_path: Path, usual: Weights, name: OptimizerName
) -> None:
    start = weights(student)
    found = learn(run, student, tmp_path / "found", replace(CONFIG, optimizer=name))
    allowed = {"adamw_torch": 1e-3, "adamw_8bit": 0.2, "adafactor": 1.5}[name]
    assert distance(found, usual) < allowed * distance(usual, start)
    assert distance(found, start) > 0.3 * distance(usual, start)


@NEEDS_BITSANDBYTES
def test_a_cut_run_ends_with_the_same_bytes(
    run: Path, student: Path, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, optimizer="adamw_8bit")
    learn(run, student, tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        cut(patch, 3)
        with pytest.raises(RuntimeError, match="cut"):
            learn(run, student, tmp_path / "cut", config)
    learn(run, student, tmp_path / "cut", config)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@NEEDS_BITSANDBYTES
def test_a_run_of_another_model_before_does_not_change_states_of_eight_bits(
    run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes keeps the embeddings' float32 states for the process, by position in the optimizer."""
    found = states(monkeypatch, state_bytes)
    full = replace(CONFIG, optimizer="adamw_8bit", epochs=0.5)
    for name, config in (("full", full), ("adapters", replace(full, lora=LoRAConfig(rank=128)))):
        learn_any(run, student, tmp_path / name, config)
        planned = estimate_training_memory(load_config(str(student)), (), 40, config, "float32")
        assert found.pop() == planned.optimizer


@pytest.mark.parametrize(
    "lora",
    [
        None,
        LoRAConfig(rank=4),
        pytest.param(LoRAConfig(rank=4, quantize="4bit"), marks=NEEDS_BITSANDBYTES),
        pytest.param(LoRAConfig(rank=4, quantize="8bit"), marks=NEEDS_BITSANDBYTES),
    ],
    ids=["full", "lora", "4bit", "8bit"],
)
def test_trained_weights_and_their_states_are_float32_below_a_bfloat16_forward(
    run: Path,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lora: LoRAConfig | None,
) -> None:
    """Updates of 5e-6 are below the rounding of bfloat16 weights."""
    found = states(
        monkeypatch,
        lambda trainer: (
            {weight.dtype for group in optimizer_of(trainer).param_groups for weight in group["params"]}
            | {value.dtype for state in optimizer_of(trainer).state.values() for value in state.values()},
            {weight.dtype for weight in trainer.model.parameters() if not weight.requires_grad}
            - {torch.uint8, torch.int8},
        ),
    )
    learn_any(run, student, tmp_path / "c", replace(CONFIG, precision="bfloat16", lora=lora, epochs=0.5))
    frozen = {torch.bfloat16} if lora else set()
    assert found == [({torch.float32}, frozen)]


@pytest.mark.parametrize("name", ["adafactor", *(name for name in OPTIMIZERS if OPTIMIZERS[name].bitsandbytes)])
def test_only_optimizers_that_fsdp2_supports_are_accepted_under_it(
    run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: OptimizerName
) -> None:
    monkeypatch.setattr(settings, "find_spec", lambda _: True)
    monkeypatch.setattr(settings, "default_device", lambda: "cuda")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=f"{name} does not work on weights that FSDP shards") as caught:
        learn(run, student, tmp_path / "c", replace(CONFIG, optimizer=name))
    assert "adamw_torch_fused or adamw_torch" in caught.value.remedy
    assert not (tmp_path / "c").exists()


def test_a_missing_library_and_a_missing_gpu_are_refused(
    run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(settings, "find_spec", lambda _: None)
        for config in (
            replace(CONFIG, optimizer="adamw_8bit"),
            replace(CONFIG, lora=LoRAConfig(quantize="4bit")),
        ):
            with pytest.raises(InputError, match="bitsandbytes, which is not installed") as caught:
                learn(run, student, tmp_path / "c", config)
            assert "pip install 'tsdkd[bitsandbytes]'" in caught.value.remedy
    monkeypatch.setattr(settings, "find_spec", lambda _: importlib.machinery.ModuleSpec("bitsandbytes", None))
    for name in ("paged_adamw_8bit", "paged_adamw_32bit"):
        with pytest.raises(InputError, match=f"{name} pages the memory of a GPU"):
            learn(run, student, tmp_path / "c", replace(CONFIG, optimizer=name))
    assert not (tmp_path / "c").exists()


def test_a_missing_library_is_refused_online(
    prompts: Path, student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(settings, "find_spec", lambda _: None)
    monkeypatch.setattr(settings, "version", absent)
    config = replace(CONFIG, optimizer="adamw_8bit", online=OnlineConfig(sampling=SAMPLING))
    with pytest.raises(InputError, match="bitsandbytes, which is not installed"):
        train_online(prompts, str(student), str(teacher), tmp_path / "c", config)
    assert not (tmp_path / "c").exists()


@NEEDS_BITSANDBYTES
@pytest.mark.parametrize(("paged", "unpaged"), [("paged_adamw_8bit", "adamw_8bit"), ("paged_adamw_32bit", None)])
def test_a_paged_optimizer_is_the_unpaged_one_up_to_the_place_of_its_states(
    run: Path,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    usual: Weights,
    paged: OptimizerName,
    unpaged: OptimizerName | None,
) -> None:
    """Only a GPU pages: bitsandbytes keeps the states of weights on a CPU in ordinary memory."""
    expected, start = usual, weights(student)
    if unpaged:
        expected = learn(run, student, tmp_path / "expected", replace(CONFIG, optimizer=unpaged))
    monkeypatch.setitem(OPTIMIZERS, paged, replace(OPTIMIZERS[paged], paged=False))  # not refused
    found = states(monkeypatch, lambda trainer: optimizer_of(trainer).is_paged)
    checkpoint = learn(run, student, tmp_path / "found", replace(CONFIG, optimizer=paged))
    assert found == [True]
    assert distance(checkpoint, expected) <= (0 if unpaged else 1e-3 * distance(expected, start))


def test_paged_states_do_not_count_as_memory_that_must_fit(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_config(str(student))
    paged, unpaged = (
        estimate_training_memory(model, (), 40, replace(CONFIG, optimizer=name), "float32")
        for name in ("paged_adamw_32bit", "adamw_torch")
    )
    assert paged.optimizer == unpaged.optimizer
    assert unpaged.total - paged.total == paged.optimizer
    assert "optimizer (paged, not in the total)" in dict(paged.rows())
    short = replace(unpaged, available=unpaged.fixed - 1)
    with pytest.raises(InputError) as caught:
        require_memory(short, CONFIG)
    assert "--optimizer adamw_8bit" in caught.value.remedy
    with monkeypatch.context() as patch:  # which refuses that optimizer
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(InputError) as caught:
            require_memory(short, CONFIG)
        assert "--optimizer" not in caught.value.remedy
    require_memory(replace(paged, available=short.available), replace(CONFIG, optimizer="paged_adamw_32bit"))


def test_only_another_optimizer_is_recorded(run: Path, student: Path, tmp_path: Path) -> None:
    assert "optimizer" not in settings.recorded_settings(CONFIG)
    assert "quantize" not in settings.recorded_settings(replace(CONFIG, lora=LoRAConfig()))["lora"]
    learn(run, student, tmp_path / "c", replace(CONFIG, optimizer="adafactor", epochs=0.5))
    manifest = load_manifest(tmp_path / "c")
    assert manifest.config["optimizer"] == "adafactor"
    assert "bitsandbytes" not in manifest.libraries
    with pytest.raises(InputError, match="optimizer"):
        learn(run, student, tmp_path / "c", replace(CONFIG, epochs=0.5))
