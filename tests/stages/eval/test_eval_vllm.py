"""vLLM's answers are transformers' answers: one benchmark of each output type, in float32."""

import gc
import importlib.util
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.helpers.models import save_tiny_model
from tests.stages.models.test_adapters import save_adapter
from tsdkd.errors import InputError
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.eval.stage import evaluate
from tsdkd.stages.models.load import load_model
from tsdkd.stages.observer import SilentObserver

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")


CONFIG = EvalConfig(("gsm8k", "sciq"), max_new_tokens=12, dtype="float32")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("served") / "model", seed=2, padding_rows=0, head_dim=32)


@pytest.mark.parametrize("adapted", [False, True])
def test_both_engines_give_the_same_results(
    served: Path, adapted: bool, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model, and of a LoRA adapter over it."""
    from vllm import LLM

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    model = str(save_adapter(served, tmp_path / "adapter") if adapted else served)
    ours = evaluate(model, tmp_path / "transformers", CONFIG, data=rows)
    bars, engines, make = Bars(), [], LLM.__init__

    def made(self: LLM, *given: object, **settings: object) -> None:
        engines.append(weakref.ref(self))
        make(self, *given, **settings)

    monkeypatch.setattr(LLM, "__init__", made)
    theirs = evaluate(model, tmp_path / "vllm", replace(CONFIG, engine="vllm", max_length=512), rows, observer=bars)
    gc.collect()
    assert [engine() for engine in engines] == [None]  # its memory is free again
    assert bars.totals == {"vllm: gsm8k answered": 6, "vllm: sciq answered": 24}
    assert bars.steps == {name: [1] * total for name, total in bars.totals.items()}  # as they are answered
    assert theirs.manifest.engine == "lm-eval 0.4.13 on vllm"
    assert theirs.manifest.summary == ours.manifest.summary
    for one, other in zip(ours.table().to_pylist(), theirs.table().to_pylist(), strict=True):
        if one["task"] == "gsm8k":  # vLLM keeps back the first bytes of a letter that was cut off
            assert _as_far_as_letters_go(one) == _as_far_as_letters_go(other)
        else:
            likelihoods = [[float(line.split()[0]) for line in row["answer"].splitlines()] for row in (one, other)]
            assert likelihoods[0] == pytest.approx(likelihoods[1], abs=0.01)


@pytest.mark.parametrize("target", ["q_proj", "lm_head", "embed_tokens"])
def test_an_adapter_is_merged_as_it_works(target: str, tmp_path: Path) -> None:
    """Over a model whose head is its embedding too, with settings of sampling that contradict each other."""
    from tsdkd.stages.eval.lm_eval_vllm import _whole

    base = save_tiny_model(tmp_path / "base", seed=2, padding_rows=0, tie_word_embeddings=True)
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(settings | {"do_sample": False, "temperature": 0.6}))
    torch.manual_seed(0)
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules=[target], init_lora_weights=False),
    )
    tuned.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(12).unsqueeze(0)
    with _whole(str(tmp_path / "adapter"), "float32") as place, torch.no_grad():
        merged, adapted, plain = (load_model(str(path)) for path in (place, tmp_path / "adapter", base))
        assert merged.end_ids == plain.end_ids
        expected = adapted.model(ids).logits
        torch.testing.assert_close(merged.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert (plain.model(ids).logits - expected).abs().max() > 0.01
    assert not place.exists()


def test_an_adapter_of_another_model_is_refused(served: Path, tmp_path: Path) -> None:
    from tsdkd.stages.eval.lm_eval_vllm import _whole

    other = save_tiny_model(tmp_path / "other", seed=2, width=48)
    adapter = save_adapter(other, tmp_path / "adapter")
    named = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(served)}
    (adapter / "adapter_config.json").write_text(json.dumps(named))
    with pytest.raises(InputError, match="does not fit its base"), _whole(str(adapter), "float32"):
        pass


class Bars(SilentObserver):
    """Remembers what was shown."""

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}
        self.steps: dict[str, list[int]] = {}

    @contextmanager
    def progress(self, what: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
        self.totals[what] = total
        yield self.steps.setdefault(what, []).append


def _as_far_as_letters_go(row: dict[str, object]) -> dict[str, object]:
    return row | {"answer": str(row["answer"]).rstrip("\N{REPLACEMENT CHARACTER}")}
