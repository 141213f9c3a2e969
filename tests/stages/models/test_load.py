"""Models: what cannot be used is named, and what decides a result is fingerprinted."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tsdkd.artifacts.manifest import MANIFEST_FILE, Manifest
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import ArtifactError, InputError
from tsdkd.stages.models import device
from tsdkd.stages.models.load import load_model, position_ids
from tsdkd.stages.models.paths import model_directory
from tsdkd.stages.models.record import model_record, require_same_tokenizer
from tsdkd.stages.models.tokenizers import vocab_size


def test_the_head_is_cut_to_real_tokens(student: Path, teacher: Path) -> None:
    """264 and 272 rows, 258 tokens: both heads speak about the same 258."""
    heads = [load_model(str(path)).head for path in (student, teacher)]
    assert [head.weight.shape[0] for head in heads] == [264, 272]
    for head in heads:
        assert head.logits(torch.zeros(3, head.weight.shape[1])).shape == (3, 258)


def test_a_head_that_does_more_than_we_know_is_refused(student: Path) -> None:
    reader = load_model(str(student))
    reader.model.lm_head.register_forward_hook(lambda _module, _input, output: output.square())
    with pytest.raises(InputError, match="does more between"):
        reader.head  # noqa: B018


def test_fingerprints_follow_content(student: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(student, copy)
    one, other = model_record("student", str(student)), model_record("student", str(copy))
    assert (one.weights, one.tokenizer, one.chat_template) == (other.weights, other.tokenizer, other.chat_template)
    model = AutoModelForCausalLM.from_pretrained(copy)
    model.lm_head.weight.data[0, 0] += 1e-3
    model.save_pretrained(copy)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    changed = model_record("student", str(copy))
    assert changed.weights != one.weights
    assert changed.chat_template != one.chat_template
    assert changed.tokenizer == one.tokenizer


def test_tokenizers_are_compared_id_by_id(student: Path, teacher: Path, stranger: Path) -> None:
    require_same_tokenizer(model_record("student", str(student)), model_record("teacher", str(teacher)))
    with pytest.raises(InputError, match=r"258 tokens.*259.*: 1 ids differ, first 258 \(None against '<\|tool"):
        require_same_tokenizer(model_record("student", str(student)), model_record("teacher", str(stranger)))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_a_path_that_is_not_there(name: str) -> None:
    with pytest.raises(InputError, match="There is no model directory"):
        model_directory(name)


def test_a_directory_that_is_no_model(student: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"it has no config\.json"):
        model_record("student", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no tokenizer"):
        model_record("student", str(tmp_path))
    weightless = tmp_path / "weightless"
    shutil.copytree(student, weightless, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(InputError, match="has no weights"):
        model_record("student", str(weightless))


def test_weights_that_cannot_be_loaded(student: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(student, torn)
    (torn / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="no causal language model that transformers can load"):
        load_model(str(torn))
    config = json.loads((torn / "config.json").read_text())
    (torn / "config.json").write_text(json.dumps(config | {"model_type": "bert", "architectures": ["Unknown"]}))
    with pytest.raises(InputError, match="no causal language model"):
        load_model(str(torn))


def test_an_unfinished_checkpoint_is_no_model(student: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(student, half)
    manifest = Manifest(kind="checkpoint", config={}, seed=0)
    with Writer.open(tmp_path / "m", manifest) as writer:
        shutil.copy(writer.path / MANIFEST_FILE, half / MANIFEST_FILE)
    with pytest.raises(ArtifactError, match="not finished"):
        model_record("student", str(half))


def test_a_model_spread_over_devices_says_the_same(teacher: Path) -> None:
    """Layers and the head wait outside the device that computes, as with device_map="auto" where GPUs are too small."""
    whole = load_model(str(teacher))
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    spread = load_model(str(teacher), device_map=places)
    assert spread.model.lm_head.weight.device.type == "meta"
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        expected, found = (reader.head.logits(reader.hidden(ids, mask)) for reader in (whole, spread))
    assert torch.equal(found[mask.bool()], expected[mask.bool()])


def test_positions_do_not_depend_on_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 0, 0]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 1], [0, 1, 2, 2, 2]]


def test_vocab_size_counts_added_tokens(stranger: Path) -> None:
    assert vocab_size(load_model(str(stranger)).tokenizer) == 259


def test_a_device_without_bf16_gets_float32(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(student).save_pretrained(tmp_path)
    for hardware, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(device, "has_bf16", lambda _, hardware=hardware: hardware)
        assert load_model(str(tmp_path)).model.dtype == dtype
        assert load_model(str(tmp_path), "bfloat16").model.dtype == torch.bfloat16
        assert load_model(str(student)).model.dtype == torch.float32
