"""LoRA adapters named in place of a model: adapter and base model are loaded and fingerprinted together."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers.models import byte_tokenizer, save_tiny_model
from tests.helpers.prompts import write_prompts
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.adapters import vllm_max_lora_rank
from tsdkd.stages.models.load import LanguageModel, load_model
from tsdkd.stages.models.lora import save_adapter as save_trained_adapter
from tsdkd.stages.models.merged import merged_model_directory
from tsdkd.stages.models.record import model_record
from tsdkd.stages.models.spec import load_spec


def save_adapter(base: Path, path: Path, *, seed: int = 0, rank: int = 4) -> Path:
    """Saves an adapter that changes its base model's logits."""
    torch.manual_seed(seed)
    settings = LoraConfig(r=rank, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def adapter(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(student, tmp_path_factory.mktemp("adapter") / "a")


def test_an_adapter_is_loaded_with_its_base_model(student: Path, adapter: Path) -> None:
    base, tuned = load_model(str(student)), load_model(str(adapter))
    ids = torch.arange(8).unsqueeze(0)
    merged = AutoModelForCausalLM.from_pretrained(student)
    from peft import PeftModel

    merged = PeftModel.from_pretrained(merged, adapter).merge_and_unload()
    with torch.no_grad():
        logits = tuned.model(ids).logits
        torch.testing.assert_close(logits, merged(ids).logits, rtol=1e-4, atol=1e-5)
        assert (logits - base.model(ids).logits).abs().max() > 0.1
    head = tuned.head.logits(tuned.hidden(ids, torch.ones_like(ids)))
    torch.testing.assert_close(head, logits[..., :258], rtol=1e-4, atol=1e-5)


def test_its_spec_is_the_base_models(student: Path, adapter: Path) -> None:
    spec = load_spec(str(adapter))
    assert (spec.directory, spec.adapter) == (student, adapter)
    base = load_model(str(student))
    assert (spec.end_ids, spec.context, spec.dtype) == (base.end_ids, base.context, "float32")
    assert vllm_max_lora_rank(adapter) == 8


def test_the_fingerprint_covers_adapter_and_base_model(student: Path, adapter: Path, tmp_path: Path) -> None:
    """It ignores where the base model lies; other weights or another adapter change it."""
    original = model_record("student", str(adapter))
    base = tmp_path / "base"
    shutil.copytree(student, base)
    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    settings = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    assert replace(model_record("student", str(moved)), name=original.name) == original
    model = AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight.data[0, 0] += 1e-3
    model.save_pretrained(base)
    assert model_record("student", str(moved)).weights != original.weights
    other = save_adapter(student, tmp_path / "other", seed=1)
    assert len({model_record("student", str(path)).weights for path in (student, adapter, other)}) == 3


def test_an_adapter_samples_other_responses_than_its_base_model(student: Path, adapter: Path, tmp_path: Path) -> None:
    prompts, config = write_prompts(tmp_path / "p.jsonl", 4), GenerateConfig(max_new_tokens=8, temperature=0)
    tuned = generate(prompts, str(adapter), tmp_path / "a", config).table()
    assert tuned["response_ids"] != generate(prompts, str(student), tmp_path / "b", config).table()["response_ids"]


def test_other_adapters_are_refused(tmp_path: Path) -> None:
    for text, cause in (
        ('{"peft_type": "PREFIX_TUNING", "base_model_name_or_path": "x"}', "not LORA"),
        ("{", "cannot be read"),
        ("{}", "cannot be read"),
    ):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(InputError, match=cause):
            model_record("student", str(tmp_path))


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


def test_a_relative_base_is_found_from_every_directory(
    student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the adapter or above it, never another model of that name in the working directory."""
    shutil.copytree(student, tmp_path / "project/models/base")
    adapter = save_adapter(student, tmp_path / "project/out/adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "models/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(teacher, elsewhere / "models/base")
    monkeypatch.chdir(elsewhere)
    assert load_spec(str(adapter)).directory == tmp_path / "project/models/base"
    shutil.copytree(teacher, tmp_path / "models/base")
    with pytest.raises(InputError, match=r"both .*models/base and .*models/base match"):
        load_spec(str(adapter))
    moved = shutil.move(adapter, tmp_path.parent / f"{tmp_path.name}-moved")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"The base model of .* is missing.*base_model_name_or_path"):
        load_spec(str(moved))


def test_a_trained_adapter_names_its_base_by_path_or_hub_id(student: Path, tmp_path: Path) -> None:
    """A model of the hub is not named by its path in the cache."""
    model = AutoModelForCausalLM.from_pretrained(student)
    model.name_or_path = "/cache/snapshots/0a1b2c"
    adapted = get_peft_model(model, LoraConfig(target_modules=ATTENTION))
    for name, base, revision in (("org/model", "org/model", "0a1b2c"), (str(student), str(student), None)):
        save_trained_adapter(adapted, LanguageModel(name, adapted, byte_tokenizer()), tmp_path)
        settings = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (settings["base_model_name_or_path"], settings["revision"]) == (base, revision)


def test_the_revision_of_a_hub_model_is_loaded(
    student: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    hub = {"base_model_name_or_path": "org/model", "revision": "0a1b2c"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | hub))
    revisions = []

    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        revisions.append((name, revision))
        return str(student)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert load_spec(str(tmp_path)).directory == student
    assert set(revisions) == {("org/model", "0a1b2c")}


def test_an_adapter_beside_a_config_is_an_adapter_but_not_beside_a_model(
    student: Path, adapter: Path, tmp_path: Path
) -> None:
    """transformers loads the adapter in both cases, and other libraries the model."""
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    shutil.copy(student / "config.json", tmp_path)
    assert load_spec(str(tmp_path)).adapter == tmp_path
    shutil.copy(student / "model.safetensors", tmp_path)
    with pytest.raises(InputError, match="holds an adapter and a whole model"):
        load_spec(str(tmp_path))
