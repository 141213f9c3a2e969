"""prune: the layers that matter least are dropped, and the result is an ordinary model of the same family."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.helpers.models import byte_tokenizer, save_tiny_model
from tests.helpers.prompts import write_prompts
from tsdkd.errors import InputError, TsdkdError
from tsdkd.stages.config.prune import PruneConfig
from tsdkd.stages.models.layers import DecoderLayers
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


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen": ("qwen2", {}),
    "two kinds of layers, softcaps": (
        "gemma2",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    ),
    "a flag for each layer": ("smollm3", {"no_rope_layer_interval": 2}),
    "every second layer has experts": (
        "qwen2_moe",
        EXPERTS | {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 2},
    ),
    "first layers without experts": (
        "glm4_moe",
        EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1, "head_dim": 8},
    ),
    "indices of layers with experts": (
        "llama4_text",
        {"intermediate_size_mlp": 32, "num_local_experts": 4, "head_dim": 8, "interleave_moe_layer_step": 2},
    ),
    "indices of layers with attention": ("bamba", MAMBA | {"attn_layer_indices": [2]}),
    "derived kinds of layers": ("falcon_h1", MAMBA | {"mamba_d_ssm": 64, "head_dim": 8}),
    "another naming": ("gpt2", GPT2),
}


def save_family(path: Path, kind: str, **more: object) -> Path:
    """Save a model of four layers, whose second layer matters least."""
    tokenizer = byte_tokenizer()
    config = AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **more,
    )  # fmt: skip
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if re.search(r"\.(layers|h)\.1\.", name):
            weight.data = weight.data - 0.9 if "norm" in name else weight.data * 0.3
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def mean_kl(teacher: Path, pruned: Path, prompts: Path) -> float:
    """KL(teacher || pruned model) per prompt token, with transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (teacher, pruned)]
    divergence, tokens = 0.0, 0
    for line in prompts.read_text().splitlines():
        chat = [{"role": "user", "content": json.loads(line)["prompt"]}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            p, q = (model(torch.tensor([ids]), use_cache=False).logits.log_softmax(-1) for model in models)
        divergence, tokens = divergence + float((p.exp() * (p - q)).sum()), tokens + len(ids)
    return divergence / tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_model_is_the_measured_one(tmp_path: Path, family: str) -> None:
    """Configs that list layers one by one, count the first ones or index them describe the layers that remain."""
    kind, more = FAMILIES[family]
    prompts = write_prompts(tmp_path / "prompts.jsonl", 2)
    teacher = save_family(tmp_path / "m", kind, **more)
    summary = prune(str(teacher), prompts, tmp_path / "p", PruneConfig(drop=1)).manifest.summary
    assert summary["dropped_layers"] != [3]  # what follows the dropped layer moves
    assert mean_kl(teacher, tmp_path / "p", prompts) == pytest.approx(summary["kl_after_each"][0], abs=1e-4)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "p")
    assert pruned.generate(torch.tensor([[5, 6]]), max_new_tokens=3).shape[1] > 2


def test_the_only_layer_of_attention_stays(tmp_path: Path) -> None:
    """It matters least; without it the cache of a hybrid model does not know how many tokens it holds."""
    kinds = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    experts = EXPERTS | {"shared_expert_intermediate_size": 16}
    teacher = save_family(tmp_path / "m", "qwen3_next", head_dim=8, layer_types=kinds, **linear, **experts)
    prompts = write_prompts(tmp_path / "prompts.jsonl", 2)
    prune(str(teacher), prompts, tmp_path / "p", PruneConfig(drop=2))
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "p")
    assert sorted(pruned.config.layer_types) == ["full_attention", "linear_attention"]
    assert pruned.generate(torch.tensor([[5, 6]]), max_new_tokens=3).shape[1] > 2


UNDESCRIBED: dict[str, tuple[str, dict[str, Any], str]] = {
    "attention by layer number": ("gpt2", GPT2 | {"scale_attn_by_inverse_layer_idx": True}, r"attn\.scaling"),
    "a period": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}, "MambaDecoderLayer"),
    "shared keys and values": (
        "gemma3n_text",
        {"head_dim": 8, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 258, "hidden_size_per_layer_input": 4},
        "kv_shared_layer_index",
    ),
}


@pytest.mark.parametrize("family", UNDESCRIBED)
def test_a_model_whose_config_cannot_describe_fewer_layers_is_refused_before_layers_are_tried(
    tmp_path: Path, prompts: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, more, reason = UNDESCRIBED[family]
    teacher = save_family(tmp_path / "m", kind, **more)
    monkeypatch.setattr("tsdkd.stages.prune._drop_layers", lambda *_: pytest.fail("a layer was tried"))
    with pytest.raises(InputError, match=reason):
        prune(str(teacher), prompts, tmp_path / "p", PruneConfig(drop=1))
    assert not (tmp_path / "p").exists()


def test_nothing_is_complete_if_the_written_model_computes_something_else(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = save_family(tmp_path / "m", "gpt2", **GPT2, scale_attn_by_inverse_layer_idx=True)
    monkeypatch.setattr(DecoderLayers, "require_description", lambda _: None)
    with pytest.raises(TsdkdError, match="differs from the one that was measured"):
        prune(str(teacher), prompts, tmp_path / "p", PruneConfig(drop=1))
    assert not (tmp_path / "p").exists()


def test_an_adapter_is_refused(tmp_path: Path, prompts: Path, student: Path) -> None:
    get_peft_model(AutoModelForCausalLM.from_pretrained(student), LoraConfig()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="is an adapter"):
        prune(str(tmp_path / "adapter"), prompts, tmp_path / "p", PruneConfig(drop=1))


def test_config_files_differ_from_the_teachers_in_what_is_pruned(tmp_path: Path, prompts: Path) -> None:
    """Also where transformers refuses to save them, because sampling values stand without do_sample."""
    teacher = save_tiny_model(tmp_path / "m", seed=5, layers=3)
    (teacher / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.95, "eos_token_id": 257}')
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"max_length": 20, "use_cache": True}))
    prune(str(teacher), prompts, tmp_path / "p", PruneConfig(drop=1, limit=1))
    for name, change in (("generation_config.json", {}), ("config.json", {"num_hidden_layers": 2})):
        before, after = (json.loads((path / name).read_text()) for path in (teacher, tmp_path / "p"))
        assert after == before | change


@pytest.mark.parametrize("drop", [0, 4, 9])
def test_at_least_one_layer_is_dropped_and_one_remains(teacher: Path, prompts: Path, tmp_path: Path, drop: int) -> None:
    with pytest.raises(InputError, match="has 4 layers"):
        prune(str(teacher), prompts, tmp_path / "p", PruneConfig(drop=drop))
    assert not (tmp_path / "p").exists()
