"""A run that was cut resumes from its last complete step and ends like an uninterrupted one."""

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from accelerate import PartialState
from torch import multiprocessing
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerControl,
    TrainerState,
)

from tests.helpers.training import CONFIG, OBJECTIVE, RecordingObserver, cut, learn
from tsdkd.artifacts.json_files import MAX_BYTES
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.errors import ArtifactError
from tsdkd.stages.train import loop, resume
from tsdkd.stages.train import trainer as trainer_module
from tsdkd.stages.train.resume import STATE_FILE, StateCallback, find_intact_step

Contents = Callable[[Path], dict[str, bytes]]


@pytest.mark.parametrize(
    ("cut_at", "opener", "tokens"),
    [(i, opener, None) for i in (0, 1, 3, 4, 5) for opener in (0.1, "adaptive")]
    + [(3, 0.1, 150), (3, "adaptive", 150)],
)
def test_a_cut_run_ends_with_the_same_bytes(
    run: Path,
    student: Path,
    tmp_path: Path,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
    cut_at: int,
    opener: float | str,
    tokens: int | None,
) -> None:
    """Cut inside one of the six steps, or while step 4 is saved."""
    config = replace(CONFIG, objective=replace(OBJECTIVE, opener=opener))
    config = replace(config, micro_batch_size=None if tokens else 2, micro_batch_tokens=tokens)
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


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
def test_a_signal_saves_the_step_and_the_next_run_resumes(
    run: Path,
    student: Path,
    tmp_path: Path,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
    signals: list[signal.Signals],
) -> None:
    """SIGTERM arrives twice where a launcher passes it on."""
    config = replace(CONFIG, save_steps=100)
    learn(run, student, tmp_path / "whole", config)
    compute_loss = trainer_module.DistillationTrainer.compute_loss

    def interrupted(self: object, *args: object, **kwargs: object) -> object:
        if self.state.global_step == 2:
            for number in signals:
                os.kill(os.getpid(), number)
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


STATE = {"window": [[0.1, 0.2]]}


def save_step(directory: Path, number: int, best: int | None = None, state: dict[str, object] = STATE) -> Path:
    """A saved step with small files, one of them in a directory as sharded states are saved."""
    step = directory / f"checkpoint-{number}"
    (step / "shards").mkdir(parents=True)
    trainer_state = TrainerState(global_step=number, best_global_step=best, is_world_process_zero=True)
    trainer_state.save_to_json(str(step / "trainer_state.json"))
    for file in FILES:
        (step / file).write_bytes(f"{file} of step {number}".encode())
    callback = StateCallback({"replay": Mock(state_dict=lambda: state)})
    callback.on_save(SimpleNamespace(output_dir=directory), trainer_state, TrainerControl())
    return step


FILES = ("optimizer.pt", "model.safetensors", "rng_state.pth", "shards/0.distcp")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGES = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "long": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "changed": flip,
    "extra": lambda file: file.with_name("pytorch_model.bin").touch(),
}


@pytest.mark.parametrize("file", [*FILES, "trainer_state.json", STATE_FILE])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_step_is_noticed_and_the_one_before_is_taken(tmp_path: Path, file: str, damage: str) -> None:
    steps = [save_step(tmp_path, number) for number in (2, 4)]
    assert find_intact_step(tmp_path) == (steps[1], "")
    DAMAGES[damage](steps[1] / file)
    path, faults = find_intact_step(tmp_path)
    assert path == steps[0]
    assert faults.startswith("4 (")
    assert damage == "extra" or file in faults or faults == "4 (not saved to its end)"
    assert not steps[1].exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"files": {}, "sha256": 1}'])
def test_a_foreign_mark_is_noticed(tmp_path: Path, content: bytes) -> None:
    (save_step(tmp_path, 2) / STATE_FILE).write_bytes(content)
    assert find_intact_step(tmp_path) == (None, f"2 ({STATE_FILE} is damaged)")


def test_other_files_beside_saved_steps_are_left_alone(tmp_path: Path) -> None:
    step = save_step(tmp_path, 2)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-9").touch()
    shutil.copytree(step, tmp_path / "checkpoint-2-copy")
    flip(tmp_path / "checkpoint-2-copy" / "optimizer.pt")
    assert find_intact_step(tmp_path) == (step, "")
    save_step(tmp_path, 4)
    save_step(tmp_path, 6)
    others = {"checkpoint-best", "checkpoint-9", "checkpoint-2-copy"}
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-6"} | others


def test_a_step_with_a_large_state_is_intact(tmp_path: Path) -> None:
    """A replay buffer of long responses has more bytes than a JSON file of an artifact may have."""
    state = {"replay_buffer": [{"response": "x" * (1 << 22)}] * 9}
    assert len(str(state)) > MAX_BYTES
    step = save_step(tmp_path, 2, state=state)
    assert find_intact_step(tmp_path) == (step, "")
    restored = Mock()
    StateCallback({"replay": restored}).restore(step)
    restored.load_state_dict.assert_called_once_with(state)


def test_a_step_needs_its_best_step(tmp_path: Path) -> None:
    """Training that ends there would take the weights of the best step."""
    best, other = save_step(tmp_path, 2, best=2), save_step(tmp_path, 4, best=2)
    assert find_intact_step(tmp_path).path == other
    flip(best / "model.safetensors")
    faults = "4 (its best step 2: model.safetensors is damaged), 2 (model.safetensors is damaged)"
    assert find_intact_step(tmp_path) == (None, faults)


@pytest.mark.parametrize(("best", "kept"), [(None, [6, 8]), (2, [2, 8]), (8, [6, 8])])
def test_the_newest_steps_and_the_best_are_kept(tmp_path: Path, best: int | None, kept: list[int]) -> None:
    for number in (2, 4, 6, 8):
        save_step(tmp_path, number, best if best and best <= number else None)
    assert sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir()) == kept


def test_an_older_step_is_deleted_only_after_the_newer_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It loses its mark first: a kill leaves no step that seems damaged."""
    save_step(tmp_path, 2)
    save_step(tmp_path, 4)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt(path.name)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt, match="checkpoint-2"):
        save_step(tmp_path, 6)
    marked = {path.parent.name for path in tmp_path.glob(f"*/{STATE_FILE}")}
    assert marked == {"checkpoint-4", "checkpoint-6"}


def test_all_files_are_on_disk_before_the_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def record(name: str) -> Callable[..., None]:
        return lambda path, *_: done.append(f"{name} {path.relative_to(tmp_path.parent)}")

    monkeypatch.setattr(resume, "fsync", record("fsync"))
    monkeypatch.setattr(resume, "replace_text", record("replace"))
    step = Path(tmp_path.name) / "checkpoint-2"
    save_step(tmp_path, 2)
    files = [step / file for file in (*FILES, "trainer_state.json")]
    directories = [step / "shards", step, step.parent, Path()]
    assert sorted(done[:-1]) == sorted(f"fsync {path}" for path in files + directories)
    assert done[-1] == f"replace {step / STATE_FILE}"


def save_own_files(rank: int, directory: Path, port: int) -> None:
    """One of two ranks saves its files; rank 1 is late."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    PartialState._reset_state()
    PartialState(cpu=True)
    step = directory / "checkpoint-2"
    step.mkdir(exist_ok=True)
    time.sleep(rank / 2)
    (step / f"rng_state_{rank}.pth").write_text(str(rank))
    state = TrainerState(global_step=2, is_world_process_zero=rank == 0)
    if rank == 0:
        state.save_to_json(str(step / "trainer_state.json"))
    StateCallback({}).on_save(SimpleNamespace(output_dir=directory), state, TrainerControl())
    PartialState().wait_for_everyone()
    assert find_intact_step(directory) == (step, "")
    PartialState().wait_for_everyone()
    if rank == 1:
        flip(step / "rng_state_1.pth")
    PartialState().wait_for_everyone()
    assert find_intact_step(directory) == (None, "2 (rng_state_1.pth is damaged)")
    PartialState().destroy_process_group()


def test_the_mark_lists_the_files_of_every_rank(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    multiprocessing.start_processes(save_own_files, (tmp_path, port), nprocs=2, start_method="fork")


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
