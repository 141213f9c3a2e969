"""vLLM and transformers give the same results: one benchmark of each output type, in the saved float32."""

import gc
import importlib.util
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from tests.helpers.adapters import save_adapter
from tests.helpers.chat_templates import THINKING_BY_DEFAULT
from tests.helpers.models import save_tiny_model
from tsdkd.errors import InputError
from tsdkd.stages.config.chat import ChatConfig
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.eval.stage import evaluate
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.tokenizers import load_tokenizer
from tsdkd.stages.observer import SilentObserver

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")


CONFIG = EvalConfig(("gsm8k", "sciq"), max_new_tokens=12, chat=ChatConfig(kwargs='{"enable_thinking": true}'))
SAMPLED = ("aime24", "aime25")
"""Benchmarks with 16 samples by default, and here with the same documents."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It has an untied head, although its config says that the head is tied; padding rows have large logits.

    Its chat template thinks by default, and writes no BOS token, which its tokenizer adds to text.
    """
    path = save_tiny_model(tmp_path_factory.mktemp("served") / "model", seed=2, padding_rows=6, head_dim=32)
    tokenizer = load_tokenizer(str(path))
    bos = ("<|start|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|start|> $A", special_tokens=[bos])
    tokenizer.chat_template = THINKING_BY_DEFAULT.replace("<|start|>", "<turn>")
    tokenizer.save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"][-6:] *= 20
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return path


@pytest.mark.parametrize("adapted", [False, True])
def test_both_engines_give_the_same_results(
    served: Path, adapted: bool, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a model, and for a LoRA adapter of it. Sampled responses differ: each engine draws its own tokens."""
    from vllm import LLM

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    model = str(save_adapter(served, tmp_path / "adapter") if adapted else served)
    config = replace(CONFIG, tasks=(*CONFIG.tasks, *SAMPLED))
    expected = evaluate(model, tmp_path / "transformers", config, data=rows)
    bars, engines, dtypes, initialize = RecordedBars(), [], [], LLM.__init__

    def record(self: LLM, *arguments: object, **settings: object) -> None:
        engines.append(weakref.ref(self))
        initialize(self, *arguments, **settings)
        dtypes.append(str(self.llm_engine.model_config.dtype).removeprefix("torch."))

    monkeypatch.setattr(LLM, "__init__", record)
    found = evaluate(model, tmp_path / "vllm", replace(config, engine="vllm", max_length=512), rows, observer=bars)
    gc.collect()
    assert [engine() for engine in engines] == [None]  # the memory is free again
    assert bars.totals == {"vllm: gsm8k": 6, "vllm: sciq": 24} | {f"vllm: {name}": 4 * 16 for name in SAMPLED}
    assert bars.steps == {name: [1] * total for name, total in bars.totals.items()}  # one step for each response
    assert found.manifest.engine == "lm-eval on vllm"
    assert {"vllm", "lm_eval"} <= found.manifest.libraries.keys()
    assert dtypes == ["float32"]
    for name in CONFIG.tasks:
        assert found.manifest.summary[name] == expected.manifest.summary[name]
    for artifact in (expected, found):
        responses = [[r["response"] for r in artifact.table().to_pylist() if r["task"] == name] for name in SAMPLED]
        assert responses[0] == responses[1]  # the same seed and the same prompts
        assert len(set(responses[0])) == 4 * 16
    for row, other in zip(expected.table().to_pylist(), found.table().to_pylist(), strict=True):
        if row["task"] in SAMPLED:
            continue
        if row["task"] == "gsm8k":  # vLLM omits the first bytes of a truncated character
            assert _without_truncated_character(row) == _without_truncated_character(other)
        else:
            likelihoods = [[float(line.split()[0]) for line in r["response"].splitlines()] for r in (row, other)]
            assert likelihoods[0] == pytest.approx(likelihoods[1], abs=0.01)


def test_a_benchmark_with_a_token_that_the_model_does_not_know_is_refused(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    model = shutil.copytree(served, tmp_path / "model")
    tokenizer = load_tokenizer(str(model))
    tokenizer.add_tokens([*(f"<{i}>" for i in range(64)), "the"])  # past the padding rows of the head
    tokenizer.save_pretrained(model)
    with pytest.raises(InputError, match="contain the id"):
        evaluate(str(model), tmp_path / "r", replace(CONFIG, tasks=("embedded",), limit=6, engine="vllm"))


@pytest.mark.parametrize("target", ["q_proj", "lm_head", "embed_tokens"])
def test_merged_weights_give_the_logits_of_the_adapter(target: str, tmp_path: Path) -> None:
    """For a base model with tied embeddings, whose sampling settings contradict each other."""
    from tsdkd.stages.models.merged import merged_model_directory

    base = save_tiny_model(tmp_path / "base", seed=2, padding_rows=0, tie_word_embeddings=True)
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(settings | {"do_sample": False, "temperature": 0.6}))
    torch.manual_seed(0)
    adapted_model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules=[target], init_lora_weights=False),
    )
    adapted_model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(12).unsqueeze(0)
    with merged_model_directory(str(tmp_path / "adapter"), "float32") as directory, torch.no_grad():
        merged, adapted, plain = (load_model(str(path)) for path in (directory, tmp_path / "adapter", base))
        assert merged.end_ids == plain.end_ids
        expected = adapted.model(ids).logits
        torch.testing.assert_close(merged.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert (plain.model(ids).logits - expected).abs().max() > 0.01
    assert not directory.exists()


def test_an_adapter_of_another_model_is_refused(served: Path, tmp_path: Path) -> None:
    from tsdkd.stages.models.merged import merged_model_directory

    other = save_tiny_model(tmp_path / "other", seed=2, width=48)
    adapter = save_adapter(other, tmp_path / "adapter")
    named = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(served)}
    (adapter / "adapter_config.json").write_text(json.dumps(named))
    with (
        pytest.raises(InputError, match="does not fit its base model"),
        merged_model_directory(str(adapter), "float32"),
    ):
        pass


class RecordedBars(SilentObserver):
    """Records the total and the steps of each progress bar."""

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}
        self.steps: dict[str, list[int]] = {}

    @contextmanager
    def progress(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
        self.totals[label] = total
        yield self.steps.setdefault(label, []).append


def _without_truncated_character(row: dict[str, object]) -> dict[str, object]:
    return row | {"response": str(row["response"]).rstrip("\N{REPLACEMENT CHARACTER}")}
