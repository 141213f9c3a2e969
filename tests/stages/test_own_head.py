"""An untied head in the files of a model whose config says tied: training and pruning keep it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.training import CONFIG, cut
from tsdkd.stages.config.prune import PruneConfig
from tsdkd.stages.config.train import LoRAConfig
from tsdkd.stages.models.load import load_model
from tsdkd.stages.prune import prune
from tsdkd.stages.train.stage import train_offline

SHORT = replace(CONFIG, epochs=1, save_steps=1)
ADAPTERS = {
    "adapter": LoRAConfig(rank=4, alpha=8),
    "merged adapter on the head": LoRAConfig(rank=4, alpha=8, merge=True, targets="q_proj,lm_head"),
}


@pytest.fixture(scope="module")
def claims_tied(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student, whose head is untied, with a config that says tied."""
    path = tmp_path_factory.mktemp("claims") / "tied"
    shutil.copytree(student, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return path


def require_same_model(path: Path, expected: Path) -> None:
    ids = torch.arange(8).unsqueeze(0)
    found, other = (load_model(str(directory)).model for directory in (path, expected))
    assert torch.equal(found(ids).logits, other(ids).logits)
    assert not found.config.tie_word_embeddings
    if (path / "config.json").is_file():  # as other libraries load it
        reloaded = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
        assert torch.equal(reloaded(ids).logits, other(ids).logits)
        assert not reloaded.config.tie_word_embeddings


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_keep_the_head(run: Path, student: Path, claims_tied: Path, tmp_path: Path, kind: str) -> None:
    config = replace(SHORT, lora=ADAPTERS[kind])
    for name, model in (("expected", student), ("found", claims_tied)):
        train_offline(run / "rollouts", run / "scores", str(model), tmp_path / name, config)
    require_same_model(tmp_path / "found", tmp_path / "expected")


def test_full_training_keeps_the_head_also_when_resumed(
    run: Path, student: Path, claims_tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = run / "rollouts", run / "scores"
    train_offline(*arguments, str(student), tmp_path / "expected", SHORT)
    with monkeypatch.context() as patch:
        cut(patch, 1)
        with pytest.raises(RuntimeError, match="cut"):
            train_offline(*arguments, str(claims_tied), tmp_path / "found", SHORT)
    train_offline(*arguments, str(claims_tied), tmp_path / "found", SHORT)
    require_same_model(tmp_path / "found", tmp_path / "expected")


def test_pruning_keeps_the_head(student: Path, claims_tied: Path, prompts: Path, tmp_path: Path) -> None:
    for name, model in (("expected", student), ("found", claims_tied)):
        prune(str(model), prompts, tmp_path / name, PruneConfig(drop=1, limit=4))
    require_same_model(tmp_path / "found", tmp_path / "expected")
