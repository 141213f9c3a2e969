"""A run that was cut resumes from its last complete step and ends like an uninterrupted one."""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerControl,
    TrainerState,
)

from tests.helpers.training import CONFIG, OBJECTIVE, RecordingObserver, cut, learn
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.errors import ArtifactError, TsdkdError
from tsdkd.stages.train import loop
from tsdkd.stages.train import trainer as trainer_module
from tsdkd.stages.train.resume import STATE_FILE, StateCallback, last_complete_step

Contents = Callable[[Path], dict[str, bytes]]


@pytest.mark.parametrize("opener", [0.1, "adaptive"])
@pytest.mark.parametrize("cut_at", [0, 1, 3, 4, 5])
def test_a_cut_run_ends_with_the_same_bytes(
    run: Path,
    student: Path,
    tmp_path: Path,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
    cut_at: int,
    opener: float | str,
) -> None:
    """Cut inside one of the six steps, or while step 4 is saved."""
    config = replace(CONFIG, objective=replace(OBJECTIVE, opener=opener))
    learn(run, student, tmp_path / "whole", config)
    cut(monkeypatch, cut_at, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        learn(run, student, tmp_path / "cut", config)
    monkeypatch.undo()
    if cut_at == 5:  # as if killed before the state file was written
        (tmp_path / "cut" / "resume" / "checkpoint-4" / STATE_FILE).unlink()
    learn(run, student, tmp_path / "cut", config)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_cut_run_is_not_resumed_with_other_settings(
    run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        learn(run, student, tmp_path / "cut")
    with pytest.raises(ArtifactError, match=r"learning_rate was 0.001, now 0.5"):
        learn(run, student, tmp_path / "cut", replace(CONFIG, learning_rate=0.5))


def test_ctrl_c_saves_the_step_and_the_next_run_resumes(
    run: Path, student: Path, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, save_steps=100)
    learn(run, student, tmp_path / "whole", config)
    compute_loss = trainer_module.DistillationTrainer.compute_loss

    def interrupted(self: object, *args: object, **kwargs: object) -> object:
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.DistillationTrainer, "compute_loss", interrupted)
    observer = RecordingObserver()
    with pytest.raises(KeyboardInterrupt):
        learn(run, student, tmp_path / "cut", config, observer=observer)
    monkeypatch.undo()
    assert any(
        message.startswith("Interrupted: training stops once this step is saved") for message in observer.messages
    )
    assert (tmp_path / "cut" / "resume" / "checkpoint-3" / STATE_FILE).is_file()
    learn(run, student, tmp_path / "cut", config)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("copied", [False, True])
def test_a_run_that_is_moved_before_its_end_keeps_its_best_step(
    run: Path, student: Path, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch, copied: bool
) -> None:
    """The weights are those of the step that the summary names, in the directory where the run now is."""
    config = replace(CONFIG, held_out=0.4, eval_steps=1, batch_size=2, learning_rate=1e-2, epochs=1)
    learn(run, student, tmp_path / "whole", config)
    assert 1 <= load_manifest(tmp_path / "whole").summary["best_step"] < 3
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            learn(run, student, tmp_path / "before", config)
    if copied:
        shutil.copytree(tmp_path / "before", tmp_path / "after")
        for step in (tmp_path / "before" / "resume").glob("checkpoint-*"):  # the copy reads none of its files
            (step / "model.safetensors").write_bytes(b"")
    else:
        (tmp_path / "before").rename(tmp_path / "after")
    learn(run, student, tmp_path / "after", config)
    assert contents(tmp_path / "after") == contents(tmp_path / "whole")


def test_a_missing_best_step_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    state = TrainerState(global_step=4, best_global_step=2, best_metric=0.5)
    with pytest.raises(TsdkdError, match="The best step of this run, 2, is missing"):
        StateCallback({}).on_train_begin(SimpleNamespace(output_dir=tmp_path), state, TrainerControl())


@pytest.mark.parametrize("lost", ["optimizer.pt", "model.safetensors", "shards/0.distcp", STATE_FILE])
def test_an_incomplete_saved_step_is_not_resumed(tmp_path: Path, lost: str) -> None:
    for step in (2, 4):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        for file in ("optimizer.pt", "model.safetensors"):
            (directory / file).touch()
        (directory / "shards").mkdir()  # as sharded states are saved
        (directory / "shards" / "0.distcp").touch()
        state = TrainerState(global_step=step, is_world_process_zero=True)
        StateCallback({}).on_save(SimpleNamespace(output_dir=tmp_path), state, TrainerControl())
    assert last_complete_step(tmp_path) == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-4" / lost).unlink()
    assert last_complete_step(tmp_path) == tmp_path / "checkpoint-2"
    assert not (tmp_path / "checkpoint-4").exists()


def test_experts_are_resumed(run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of this model name its weights differently from the model in memory."""
    shape = AutoConfig.from_pretrained(student)
    torch.manual_seed(0)
    experts = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=shape.vocab_size,
            hidden_size=32,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )
    experts.save_pretrained(tmp_path / "experts")
    AutoTokenizer.from_pretrained(student).save_pretrained(tmp_path / "experts")
    whole = learn(run, tmp_path / "experts", tmp_path / "whole")
    with monkeypatch.context() as patch:
        cut(patch, 3)
        with pytest.raises(RuntimeError, match="cut"):
            learn(run, tmp_path / "experts", tmp_path / "cut")
    resumed = learn(run, tmp_path / "experts", tmp_path / "cut")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
