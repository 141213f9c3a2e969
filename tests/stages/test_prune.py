"""prune: the layers that matter least are dropped, and the result is an ordinary model of the same family."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tests.helpers.models import byte_tokenizer, save_tiny_model
from tsdkd.errors import InputError
from tsdkd.stages.config.prune import PruneConfig
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.record import model_record
from tsdkd.stages.prune import prune


def make_idle(path: Path, layer: int) -> None:
    """Make a layer add nothing to the residual stream."""
    model = AutoModelForCausalLM.from_pretrained(path)
    model.model.layers[layer].self_attn.o_proj.weight.data.zero_()
    model.model.layers[layer].mlp.down_proj.weight.data.zero_()
    model.save_pretrained(path)


@pytest.mark.parametrize("idle", [0, 2, 3])
def test_an_idle_layer_is_dropped_first_and_changes_nothing(tmp_path: Path, prompts: Path, idle: int) -> None:
    teacher = save_tiny_model(tmp_path / "m", seed=5, layers=4)
    make_idle(teacher, idle)
    artifact = prune(str(teacher), prompts, tmp_path / "p", PruneConfig(drop=2))
    summary = artifact.manifest.summary
    assert summary["dropped_layers"][0] == idle
    assert summary["kl_after_each"][0] == pytest.approx(0, abs=1e-4)
    assert summary["kl_after_each"][1] > 0.01
    full, pruned = (load_model(str(path)) for path in (teacher, tmp_path / "p"))
    assert pruned.model.config.num_hidden_layers == summary["layers"] == 2
    ids = torch.tensor([[5, 6, 7]])
    remaining = [i for i in range(4) if i not in summary["dropped_layers"]]
    full.model.model.layers = torch.nn.ModuleList(full.model.model.layers[i] for i in remaining)
    assert torch.allclose(full.model(ids, use_cache=False).logits, pruned.model(ids).logits, atol=1e-5)
    assert model_record("a", str(teacher)).tokenizer == model_record("b", str(tmp_path / "p")).tokenizer
    assert pruned.model.generate(ids, max_new_tokens=3).shape[1] > 3  # the cache knows the new depth


FAMILIES = {
    "qwen": (Qwen2Config, Qwen2ForCausalLM, {}),
    "gemma": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(tmp_path: Path, prompts: Path, family: str) -> None:
    """Gemma2 alternates two kinds of layers and soft-caps its logits; the pruned model keeps both."""
    config_class, model_class, more = FAMILIES[family]
    tokenizer = byte_tokenizer()
    config = config_class(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id, **more,
    )  # fmt: skip
    model_class(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    artifact = prune(str(tmp_path / "m"), prompts, tmp_path / "p", PruneConfig(drop=1))
    pruned = load_model(str(tmp_path / "p"))
    (dropped,) = artifact.manifest.summary["dropped_layers"]
    assert pruned.model.config.layer_types == [t for i, t in enumerate(config.layer_types) if i != dropped]
    assert pruned.head.softcap == getattr(config, "final_logit_softcapping", None)
    assert pruned.model.generate(torch.tensor([[5, 6]]), max_new_tokens=3).shape[1] > 2


@pytest.mark.parametrize("drop", [0, 4, 9])
def test_at_least_one_layer_is_dropped_and_one_remains(teacher: Path, prompts: Path, tmp_path: Path, drop: int) -> None:
    with pytest.raises(InputError, match="has 4 layers"):
        prune(str(teacher), prompts, tmp_path / "p", PruneConfig(drop=drop))
    assert not (tmp_path / "p").exists()
