"""The student answers through vLLM while it learns: with the weights of this very step, or not at all."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tests.helpers.training import CONFIG, metrics
from tsdkd.errors import TsdkdError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.train import LoRAConfig, OnlineConfig
from tsdkd.stages.engines import choice
from tsdkd.stages.engines.engine_check import diagnose_difference
from tsdkd.stages.engines.vllm_engine import VllmEngine
from tsdkd.stages.train.stage import train_online

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

SAMPLING = GenerateConfig(engine="vllm", max_new_tokens=16, memory_fraction=0.1)
LIVE = replace(CONFIG, online=OnlineConfig(sampling=SAMPLING), learning_rate=3e-2, epochs=1, warmup_ratio=0.0)


@pytest.fixture(autouse=True, scope="module")
def vllm_is_there() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "has_vllm", lambda: True)
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        yield


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("served") / "model", seed=5, head_dim=32)


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=4)], ids=["full", "lora"])
def test_after_each_update_vllm_has_the_new_weights(
    served: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: LoRAConfig | None
) -> None:
    """Three steps; what is compared is right each time, and would be wrong by far with the weights of the start."""
    differences: list[float] = []

    def watch(logits: list, sung: list, temperature: float, top_p: float, noise: float) -> object:
        told = [value for one in sung for value in one.logprobs]
        expected = [
            float(row.log_softmax(-1)[token])
            for rows, one in zip(logits, sung, strict=True)
            for row, token in zip(rows, one.ids, strict=True)
        ]
        differences.append(sum(abs(a - b) for a, b in zip(told, expected, strict=True)) / len(told))
        return diagnose_difference(logits, sung, temperature, top_p, noise)

    monkeypatch.setattr("tsdkd.stages.engines.engine_check.diagnose_difference", watch)
    prompts = write_prompts(tmp_path / "prompts.jsonl", 12)
    train_online(prompts, str(served), str(teacher), tmp_path / "c", replace(LIVE, lora=lora))
    assert len(metrics(tmp_path / "c")) == len(differences) == 3
    assert max(differences) < 0.005


def test_weights_that_did_not_arrive_stop_the_run(
    served: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VllmEngine, "reload", lambda *_: None)
    prompts = write_prompts(tmp_path / "prompts.jsonl", 12)
    with pytest.raises(TsdkdError, match="disagree") as caught:
        train_online(prompts, str(served), str(teacher), tmp_path / "c", LIVE)
    assert "weights" in caught.value.remedy.lower()
