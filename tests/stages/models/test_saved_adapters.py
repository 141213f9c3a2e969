"""Saved adapters on their base model: the logits are those of peft, or the adapter is refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.models import byte_tokenizer, save_tiny_model
from tsdkd.errors import InputError
from tsdkd.stages.models.adapters import vllm_max_lora_rank
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.merged import merged_model_directory

IDS = torch.arange(5, 30).unsqueeze(0)
ATTENTION = ["q_proj", "v_proj"]
KINDS: dict[str, dict[str, object]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "ranks and scales by module": {"rank_pattern": {"0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "weight-decomposed": {"use_dora": True},
    "biases": {"lora_bias": True},
    "initialised from the base model": {"init_lora_weights": "pissa"},
    "head": {"target_modules": [*ATTENTION, "lm_head"]},
    "weight-decomposed head": {"target_modules": [*ATTENTION, "lm_head"], "use_dora": True},
    "embeddings": {"target_modules": [*ATTENTION, "embed_tokens"]},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved embeddings": {"modules_to_save": ["embed_tokens"]},
    "saved norms": {"modules_to_save": ["norm"]},
    "tokens": {"trainable_token_indices": [5, 6]},
}
SERVED = {"plain", "rank-stabilised", "ranks and scales by module"}


def make_adapter(base: Path, path: Path, rows: int | None = None, **settings: object) -> torch.Tensor:
    """Saves an adapter with random weights, and returns its logits. `rows`: of resized embeddings."""
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    if rows:
        model.resize_token_embeddings(rows)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(**({"r": 4, "target_modules": ATTENTION} | settings)))
    with torch.no_grad():
        for weight in adapted.parameters():
            weight.add_(weight.requires_grad * 0.1 * torch.randn(weight.shape))
        adapted.save_pretrained(path)
        return adapted.eval()(IDS).logits


def logits_of(model: LanguageModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's logits, and those of its hidden states and its head."""
    with torch.no_grad():
        return model.model(input_ids=IDS).logits, model.head.logits(model.hidden(IDS, torch.ones_like(IDS)))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Models without and with tied embeddings."""
    path = tmp_path_factory.mktemp("bases")
    return {tied: save_tiny_model(path / f"{tied}", seed=0, tie_word_embeddings=tied) for tied in (False, True)}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_peft(kind: str, tied: bool, bases: dict[bool, Path], tmp_path: Path) -> None:
    """Of the loaded model, of its hidden states and head, and of the merged model."""
    expected = make_adapter(bases[tied], tmp_path, **KINDS[kind])
    logits, of_head = logits_of(load_model(str(tmp_path)))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_head, expected[..., :258], rtol=1e-4, atol=1e-4)
    assert bool(vllm_max_lora_rank(tmp_path)) == (kind in SERVED)
    if kind == "biases":  # the base model has none
        with pytest.raises(InputError, match="cannot be merged"), merged_model_directory(str(tmp_path), "float32"):
            pass
        return
    with merged_model_directory(str(tmp_path), "float32") as merged:
        torch.testing.assert_close(logits_of(load_model(str(merged)))[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "config", "settings"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        (
            "mixtral",
            {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
            | {"num_key_value_heads": 2, "num_local_experts": 4},
            {"target_parameters": ["experts.gate_up_proj"]},
        ),
    ],
)
def test_adapters_on_layers_that_are_not_linear_have_pefts_logits(
    family: str, config: dict[str, int], settings: dict[str, object], tmp_path: Path
) -> None:
    """GPT-2's layers are transposed; experts are parameters."""
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, vocab_size=264, initializer_range=0.2, **config)
    ).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    expected = make_adapter(tmp_path / "base", tmp_path / "adapter", **settings)
    torch.testing.assert_close(logits_of(load_model(str(tmp_path / "adapter")))[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_embeddings_grow_with_an_extended_vocabulary(bases: dict[bool, Path], tmp_path: Path) -> None:
    """The adapter holds the new rows, whole or as single tokens."""
    tokens = {"embed_tokens": list(range(264, 270)), "lm_head": list(range(264, 270))}
    for i, settings in enumerate(
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, {"trainable_token_indices": tokens})
    ):
        expected = make_adapter(bases[False], tmp_path / f"{i}", 270, **settings)
        byte_tokenizer(tuple(f"<{n}>" for n in range(12))).save_pretrained(tmp_path / f"{i}")
        for logits in logits_of(load_model(str(tmp_path / f"{i}"))):
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    make_adapter(bases[False], tmp_path / "partial", 270, trainable_token_indices=tokens | {"lm_head": [269]})
    with pytest.raises(InputError, match="trained with 270 embedding rows, its base model has 264"):
        load_model(str(tmp_path / "partial"))


@pytest.mark.parametrize("change", [{"remove": "lora_A"}, {"rename": "v_proj"}, {"cut": "q_proj"}])
def test_weights_that_do_not_fit_are_refused(change: dict[str, str], student: Path, tmp_path: Path) -> None:
    """peft keeps the random weights of a missing tensor, and ignores a tensor that matches no module."""
    make_adapter(student, tmp_path)
    ((how, part),) = change.items()
    weights = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in weights if part in name)
    weight = weights.pop(name)
    if how == "rename":
        weights[name.replace(part, "other")] = weight
    elif how == "cut":
        weights[name] = weight[:, :-1].contiguous()
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="does not fit its base model"):
        load_model(str(tmp_path))


def test_settings_that_peft_would_ignore_are_refused(student: Path, tmp_path: Path) -> None:
    """Settings of a newer peft; an initialisation that cannot be repeated; adapters that work after certain tokens."""
    make_adapter(student, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    for added, cause in (
        ({"use_newest_lora": True}, "does not know: use_newest_lora"),
        ({"init_lora_weights": "pissa_niter_4"}, "randomised PiSSA"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"base_model_name_or_path": None}, "names no base model"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | added))
        with pytest.raises(InputError, match=cause):
            load_model(str(tmp_path))
