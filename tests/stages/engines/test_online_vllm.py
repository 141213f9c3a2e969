"""Online training with vLLM samples with the weights of the current step, or stops."""

from collections.abc import Iterator
from contextlib import nullcontext
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
from tsdkd.stages.engines import choice, online_vllm
from tsdkd.stages.engines.engine_check import diagnose_mismatch
from tsdkd.stages.engines.vllm_engine import VllmEngine
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.spec import load_spec
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.train.stage import train_online

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

SAMPLING = GenerateConfig(engine="vllm", max_new_tokens=16, memory_fraction=0.1)
ONLINE = replace(CONFIG, online=OnlineConfig(sampling=SAMPLING), learning_rate=3e-2, epochs=1, warmup_ratio=0.0)


@pytest.fixture(autouse=True, scope="module")
def vllm_is_installed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "has_vllm", lambda: True)
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        yield


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("served") / "model", seed=5, head_dim=32)


@pytest.fixture(scope="module", autouse=True)
def engine(served: Path) -> Iterator[VllmEngine]:
    """One engine for all runs, which takes half a minute to load; it has the student's weights until the full run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        arguments = {"enable_lora": True, "max_lora_rank": 8}
        with VllmEngine(load_spec(str(served)), replace(SAMPLING, dtype="float32"), 128, arguments) as engine:
            patch.setattr(online_vllm, "VllmEngine", lambda *_: nullcontext(engine))
            yield engine


@pytest.mark.parametrize("lora", [LoRAConfig(rank=4), None], ids=["lora", "full"])
def test_after_each_update_vllm_has_the_new_weights(
    served: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: LoRAConfig | None
) -> None:
    """Log-probabilities agree in each of three steps; those of the initial weights would differ by far more."""
    differences: list[float] = []

    def measure(logits: list, outputs: list, temperature: float, top_p: float, tolerance: float) -> object:
        log_probs = [value for output in outputs for value in output.log_probs]
        expected = [
            float(row.log_softmax(-1)[token])
            for rows, output in zip(logits, outputs, strict=True)
            for row, token in zip(rows, output.response_ids, strict=True)
        ]
        differences.append(sum(abs(a - b) for a, b in zip(log_probs, expected, strict=True)) / len(log_probs))
        return diagnose_mismatch(logits, outputs, temperature, top_p, tolerance)

    monkeypatch.setattr("tsdkd.stages.engines.engine_check.diagnose_mismatch", measure)
    prompts = write_prompts(tmp_path / "prompts.jsonl", 12)
    train_online(prompts, str(served), str(teacher), tmp_path / "c", replace(ONLINE, lora=lora))
    assert len(metrics(tmp_path / "c")) == len(differences) == 3
    assert max(differences) < 0.005


def test_stale_weights_stop_the_run(
    served: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VllmEngine, "load", lambda *_: None)
    prompts = write_prompts(tmp_path / "prompts.jsonl", 12)
    with pytest.raises(TsdkdError, match="disagree") as caught:
        train_online(prompts, str(served), str(teacher), tmp_path / "c", ONLINE)
    assert "weights" in caught.value.remedy.lower()


def test_vllm_samples_no_ids_that_the_teacher_lacks(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr(online_vllm, "VllmEngine", lambda spec, *_: opened.append(spec.vocab) or nullcontext())
    spec, online = replace(load_spec(str(served)), vocab=200), OnlineConfig(sampling=replace(SAMPLING, dtype="float32"))
    with online_vllm.open_vllm_sampler(spec, load_model(str(served)), online, None, 32, SilentObserver()):
        assert opened == [200]
