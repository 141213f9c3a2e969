"""A power cut that damages saved steps costs at most the steps since an intact one, and changes no weight."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.training import CONFIG, RecordingObserver, cut, learn
from tsdkd.errors import TsdkdError
from tsdkd.stages.train.trainer import DistillationTrainer

Contents = Callable[[Path], dict[str, bytes]]


@pytest.fixture(scope="module")
def cut_run(run: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted checkpoint in `whole`, and one in `cut` whose steps 2 and 4 are saved."""
    directory = tmp_path_factory.mktemp("cut")
    learn(run, student, directory / "whole")
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, 5)
        with pytest.raises(RuntimeError, match="cut"):
            learn(run, student, directory / "cut")
    return directory


def flip(file: Path) -> None:
    """Change a bit in the middle: of a weight, an optimizer state, a random state or a number."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "files", "message"),
    [
        (flip, ["4/model.safetensors"], "4 (model.safetensors is damaged). Training continues after step 2."),
        (truncate, ["4/optimizer.pt"], "4 (optimizer.pt is damaged). Training continues after step 2."),
        (
            flip,
            ["2/trainer_state.json", "4/rng_state.pth"],
            "4 (rng_state.pth is damaged), 2 (trainer_state.json is damaged). Training starts from the beginning.",
        ),
    ],
    ids=["a flipped bit", "a short file", "every step"],
)
def test_training_continues_after_the_newest_intact_step(
    run: Path,
    student: Path,
    cut_run: Path,
    tmp_path: Path,
    contents: Contents,
    damage: Callable[[Path], None],
    files: list[str],
    message: str,
) -> None:
    output, observer = shutil.copytree(cut_run / "cut", cut_run / tmp_path.name), RecordingObserver()
    for file in files:
        damage(output / "resume" / f"checkpoint-{file}")
    learn(run, student, output, observer=observer)
    assert f"Damaged saved steps were deleted: {message}" in observer.warnings
    assert contents(output) == contents(cut_run / "whole")


def test_a_best_step_that_is_damaged_during_training_is_not_replaced_by_the_last_one(
    run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, held_out=0.4, eval_steps=1, batch_size=2, epochs=1)
    load_best = DistillationTrainer._load_best_model

    def lost_before(trainer: DistillationTrainer) -> None:
        (Path(str(trainer.state.best_model_checkpoint)) / "model.safetensors").unlink()
        load_best(trainer)

    monkeypatch.setattr(DistillationTrainer, "_load_best_model", lost_before)
    with pytest.raises(TsdkdError, match=r"damaged \(model.safetensors is missing\)"):
        learn(run, student, tmp_path / "c", config)


def test_a_trainer_that_is_refused_leaves_nothing(
    run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer makes its directory before it is complete."""

    def refused(*_: object) -> None:
        raise TsdkdError("refused", "Choose another.")

    monkeypatch.setattr("tsdkd.stages.train.trainer.require_supported_strategy", refused)
    with pytest.raises(TsdkdError, match="refused"):
        learn(run, student, tmp_path / "c")
    assert not (tmp_path / "c").exists()
