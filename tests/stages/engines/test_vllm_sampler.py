"""The sampler of online training over several ranks, with a stand-in for vLLM."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.training import SAMPLING
from tsdkd.errors import InputError, TsdkdError
from tsdkd.stages.config.train import LoRAConfig, OnlineConfig
from tsdkd.stages.data.requests import Request
from tsdkd.stages.engines import online_vllm
from tsdkd.stages.engines.online_vllm import VllmSampler, lora_arguments, require_rollout_gpus
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.spec import load_spec

SAMPLING_IN_FLOAT32 = replace(SAMPLING, dtype="float32")


class Engine:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def load(self, directory: Path) -> None:
        self.calls.append("load" if list(directory.glob("*.safetensors")) else "load nothing")

    def load_adapter(self, directory: Path) -> None:
        self.calls.append("load adapter")


def requests(count: int) -> list[Request]:
    return [Request(str(i), [65 + i], i) for i in range(count)]


def test_all_ranks_check_the_same_requests_and_stop_together(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This rank has one request and no difference; the other rank has five, and its engine differs."""
    checked: list[list[Request]] = []

    def gather(own: list[Any]) -> list[Any]:
        return [*own, *requests(5)] if own != [None] else [None, ("differs", "Remedy.")]

    monkeypatch.setattr(online_vllm, "gather", gather)
    monkeypatch.setattr(online_vllm, "find_mismatch", lambda _, chosen, *__: checked.append(chosen))
    engine = Engine()
    sampler = VllmSampler(engine, SAMPLING_IN_FLOAT32, tmp_path, adapter=False)
    with pytest.raises(TsdkdError, match="differs"):
        sampler.update(load_model(str(student)), requests(1))
    assert checked == [[*requests(1), *requests(3)]]
    assert engine.calls == ["load"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("has_base", [False, True])
def test_the_base_goes_before_the_first_adapter_to_a_server_that_may_hold_another(
    student: Path, tmp_path: Path, has_base: bool
) -> None:
    """Held-out responses are sampled before the student has an adapter."""
    from tsdkd.stages.models.new_adapters import add_lora

    engine, learner = Engine(), load_model(str(student))
    sampler = VllmSampler(engine, SAMPLING_IN_FLOAT32, tmp_path, adapter=True, has_base=has_base)
    sampler.update(learner, [])
    adapted = add_lora(learner, LoRAConfig(rank=4), 0)
    sampler.update(adapted, [])
    sampler.update(adapted, [])
    assert engine.calls == ["load"] * (not has_base) + ["load adapter"] * 2


def test_vllm_gets_adapters_that_it_serves(student: Path) -> None:
    spec = load_spec(str(student))
    assert lora_arguments(spec, None) == {}
    assert lora_arguments(spec, LoRAConfig(rank=4)) == {"enable_lora": True, "max_lora_rank": 8}
    assert lora_arguments(spec, LoRAConfig(rank=9, targets="q_proj, v_proj"))["max_lora_rank"] == 16
    assert lora_arguments(spec, LoRAConfig(targets="q_proj, lm_head")) == {}
    assert lora_arguments(spec, LoRAConfig(rank=513)) == {}


def test_vllm_takes_what_is_given_of_the_memory_and_less_beside_training() -> None:
    beside, alone = OnlineConfig(sampling=replace(OnlineConfig().sampling, engine="vllm")), {"rollout_gpus": 1}
    assert (beside.memory_fraction, replace(beside, **alone).memory_fraction) == (0.3, 0.9)
    given = replace(beside, sampling=replace(beside.sampling, memory_fraction=0.3), **alone)
    assert given.memory_fraction == 0.3


def test_rollout_gpus_are_those_that_do_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}.items():
        monkeypatch.setenv(name, value)
    assert require_rollout_gpus(2) == ["6", "7"]
    with pytest.raises(InputError, match="of 4 GPUs, training takes 2"):
        require_rollout_gpus(3)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(InputError, match="one machine"):
        require_rollout_gpus(1)
