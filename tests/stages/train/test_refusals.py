"""Inputs and options that offline training refuses, before it writes anything."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.training import CONFIG, OBJECTIVE, learn
from tsdkd.core import TSDKDConfig
from tsdkd.errors import ArtifactError, InputError, NotFiniteError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.load import load_model
from tsdkd.stages.score.stage import score
from tsdkd.stages.train import loop, settings
from tsdkd.stages.train.stage import train_offline

Contents = Callable[[Path], dict[str, bytes]]


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(
    run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_broken(*arguments: object, **settings: object) -> LanguageModel:
        model = load_model(*arguments, **settings)
        model.model.lm_head.weight.data[3, 3] = float("nan")
        return model

    monkeypatch.setattr(loop, "load_model", load_broken)
    with pytest.raises(
        NotFiniteError, match=r"loss is nan at step 1 \(indirect, direct, entropy\), samples [0-9a-f]+-0, [0-9a-f]+-0"
    ) as caught:
        learn(run, student, tmp_path / "c")
    assert "--learning-rate" in caught.value.remedy
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("signal_", "objective", "cause"),
    [
        ("hidden", replace(OBJECTIVE, k=258), "allow only 257"),
        ("topk", replace(OBJECTIVE, k=5), "allow only 4"),
        ("topk", replace(OBJECTIVE, temperature=2.0), "hold at temperature 1"),
        ("ranks", OBJECTIVE, "no teacher distribution"),
    ],
)
def test_insufficient_scores_are_refused_before_anything_is_written(
    run: Path, student: Path, teacher: Path, tmp_path: Path, signal_: str, objective: TSDKDConfig, cause: str
) -> None:
    score(run / "rollouts", str(student), str(teacher), tmp_path / "s", ScoreConfig(signal=signal_, k=4, top_k=8))
    with pytest.raises(InputError, match=cause):
        train_offline(
            run / "rollouts", tmp_path / "s", str(student), tmp_path / "c", replace(CONFIG, objective=objective)
        )
    assert not (tmp_path / "c").exists()


def test_ranks_cannot_be_measured_on_held_out_prompts(run: Path, student: Path, teacher: Path, tmp_path: Path) -> None:
    score(run / "rollouts", str(student), str(teacher), tmp_path / "s", ScoreConfig(signal="ranks", k=4))
    config = replace(CONFIG, objective=replace(OBJECTIVE, direct_weight=0), held_out=0.4, eval_steps=1)
    with pytest.raises(InputError, match="--held-out needs") as caught:
        train_offline(run / "rollouts", tmp_path / "s", str(student), tmp_path / "c", config)
    assert "Leave out --held-out" in caught.value.remedy
    assert not (tmp_path / "c").exists()


def test_foreign_scores_are_refused(run: Path, student: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "another"}\n')
    generate(prompts, str(student), tmp_path / "other", GenerateConfig(max_new_tokens=4))
    with pytest.raises(ArtifactError, match="other rollouts"):
        train_offline(tmp_path / "other", run / "scores", str(student), tmp_path / "c", CONFIG)


def test_a_student_of_another_family_is_refused(run: Path, other_family: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="different tokenizers: 1 ids differ"):
        learn(run, other_family, tmp_path / "c")


def test_micro_batches_must_divide(run: Path, student: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Micro-batches of 3 in 1 processes do not divide a batch of 4"):
        learn(run, student, tmp_path / "c", replace(CONFIG, micro_batch_size=3))


def test_compiling_without_hidden_states_is_refused_before_anything_is_written(
    run: Path, student: Path, teacher: Path, tmp_path: Path
) -> None:
    score(run / "rollouts", str(student), str(teacher), tmp_path / "s", ScoreConfig(signal="topk", k=4, top_k=8))
    with pytest.raises(InputError, match="needs the teacher's hidden states"):
        train_offline(run / "rollouts", tmp_path / "s", str(student), tmp_path / "c", replace(CONFIG, compile=True))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("device", "triton", "cause"),
    [
        ("cpu", None, r"a C\+\+ compiler, and nothing-compiles is not installed"),
        ("cuda", None, "needs Triton"),
        ("cuda", "there", "a C compiler, and nothing-compiles is not installed"),
    ],
)
def test_compiling_without_a_compiler_is_refused_before_anything_is_written(
    device: str,
    triton: str | None,
    cause: str,
    run: Path,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("CC", "CXX"):
        monkeypatch.setenv(variable, "nothing-compiles")
    monkeypatch.setattr(loop, "default_device", lambda: device)
    monkeypatch.setattr(settings, "find_spec", lambda _: triton)
    monkeypatch.setattr(loop, "training_arguments", lambda *_: None)
    with pytest.raises(InputError, match=cause) as caught:
        learn(run, student, tmp_path / "c", replace(CONFIG, compile=True))
    assert "leave out --compile" in caught.value.remedy
    assert not (tmp_path / "c").exists()
