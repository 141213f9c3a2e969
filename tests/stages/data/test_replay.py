"""DistiLLM's schedule: when the student answers and what it is replayed, by hand and as a run that is cut."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.prompts import write_prompts
from tests.helpers.training import CONFIG, metrics
from tests.stages.methods.test_methods import cut
from tests.stages.train.test_online import SAMPLING
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.train import OnlineConfig, ReplayConfig, TrainConfig
from tsdkd.stages.data.replay import ReplaySchedule, ReplaySource
from tsdkd.stages.data.sources import Sample
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.methods import find_method
from tsdkd.stages.train.stage import train_online

Contents = Callable[[Path], dict[str, bytes]]
REPLAY = ReplayConfig(phi=0.6, replay_tolerance=0.0, replay_capacity=4)


def config(replay: ReplayConfig, **more: object) -> TrainConfig:
    live = OnlineConfig(student_fraction=0, sampling=SAMPLING, replay=replay)
    more = {"epochs": 3, "batch_size": 2, "held_out": 0.3, "eval_steps": 3} | more
    return replace(CONFIG, method="distillm", objective=find_method("distillm").objective, online=live, **more)


@pytest.fixture(scope="module")
def answers(student: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("answers")
    prompts = write_prompts(place / "prompts.jsonl", 10)
    generate(prompts, str(teacher), place / "rollouts", GenerateConfig(policy="teacher", max_new_tokens=12))
    return place / "rollouts"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[list[int]]]]:
    """Of each step, the schedule's choice and the responses that were learned from."""
    seen: list[tuple[str, list[list[int]]]] = []
    choose, answered = ReplaySchedule.choose, ReplaySource.with_responses
    choices: list[str] = []

    def chosen(self: ReplaySchedule, *given: float) -> str:
        choices.append(choose(self, *given))
        return choices[-1]

    def spy(self: ReplaySource, *given: object) -> list[Sample]:
        found = answered(self, *given)
        seen.append((choices[-1], [sample["response_ids"] for sample in found]))
        return found

    monkeypatch.setattr(ReplaySchedule, "choose", chosen)
    monkeypatch.setattr(ReplaySource, "with_responses", spy)
    return seen


@pytest.mark.parametrize(
    ("draw", "progress", "full", "choice"),
    [
        (0.0, 0.0, True, "fresh"),
        (0.39, 0.5, True, "again"),  # phi 0.4, of which half is left for fresh answers
        (0.19, 0.5, True, "fresh"),
        (0.39, 0.5, False, "fresh"),  # there is room for more
        (0.41, 0.5, False, "recorded"),
        (0.41, 0.0, True, "recorded"),
        (0.01, 1.0, True, "again"),
    ],
)
def test_a_draw_decides(draw: float, progress: float, full: bool, choice: str) -> None:
    schedule = ReplaySchedule(ReplayConfig(phi=0.4, replay_capacity=2))
    schedule.kept.extend([{}, {}] if full else [{}])
    assert schedule.choose(draw, progress) == choice


def test_phi_rises_when_the_divergence_does() -> None:
    """From the mark 1.0: 1.05 is within the tolerance, 1.1 raises phi and the mark, 1.15 is near it, 1.3 raises it."""
    schedule = ReplaySchedule(ReplayConfig(replay_tolerance=0.1))
    found = []
    for divergence in (1.0, 1.05, 1.1, 1.15, 0.5, 1.3):
        schedule.judge(divergence)
        found.append(schedule.phi)
    assert found == pytest.approx([0, 0, 0.1, 0.1, 0.1, 0.2])
    for divergence in range(2, 40):
        schedule.judge(divergence)
    assert schedule.phi == 1


def test_the_oldest_answer_makes_room() -> None:
    schedule = ReplaySchedule(ReplayConfig(replay_capacity=2))
    schedule.kept.extend([{"sample_id": name} for name in "abc"])
    assert [sample["sample_id"] for sample in schedule.kept] == ["b", "c"]


def test_a_saved_schedule_goes_on_where_it_was() -> None:
    schedule, other = (ReplaySchedule(ReplayConfig(replay_tolerance=0.1)) for _ in range(2))
    schedule.kept.append({"sample_id": "a"})
    for divergence in (1.0, 1.3):
        schedule.judge(divergence)
    other.load_state_dict(schedule.state_dict())
    assert (other.phi, other.mark, list(other.kept)) == (0.1, 1.3, [{"sample_id": "a"}])
    for one in (schedule, other):
        one.judge(float("nan"))  # nothing was measured
        one.judge(1.35)
    assert other.phi == schedule.phi == 0.1


def test_a_run_learns_from_recorded_fresh_and_kept_answers(
    answers: Path, student: Path, teacher: Path, tmp_path: Path, steps: list[tuple[str, list[list[int]]]]
) -> None:
    train_online(answers, str(student), str(teacher), tmp_path / "c", config(REPLAY))
    assert set(Counter(choice for choice, _ in steps)) == {"recorded", "fresh", "again"}
    said: list[list[int]] = []
    for choice, responses in steps:
        if choice == "fresh":
            said += responses
        if choice == "again":
            assert all(response in said[-REPLAY.replay_capacity :] for response in responses)


def test_without_phi_it_learns_from_recorded_answers_until_the_divergence_rises(
    answers: Path, student: Path, teacher: Path, tmp_path: Path, steps: list[tuple[str, list[list[int]]]]
) -> None:
    """A learning rate that does harm: from some measurement on the student answers."""
    harmful = config(replace(REPLAY, phi=0.0, phi_step=1.0), learning_rate=0.3, eval_steps=2)
    train_online(answers, str(student), str(teacher), tmp_path / "c", harmful)
    choices = [choice for choice, _ in steps]
    assert choices[:4] == ["recorded"] * 4  # the second measurement is the first that can be worse
    assert "recorded" not in choices[-2:]
    steps.clear()
    train_online(
        answers,
        str(student),
        str(teacher),
        tmp_path / "d",
        config(replace(REPLAY, phi=0.0, replay_tolerance=99), epochs=1),
    )
    assert {choice for choice, _ in steps} == {"recorded"}


def test_a_cut_run_ends_with_the_same_bytes(
    answers: Path,
    student: Path,
    teacher: Path,
    tmp_path: Path,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """phi, its mark and the kept answers are saved with each step."""
    models, settings = (str(student), str(teacher)), config(replace(REPLAY, phi_step=0.3), learning_rate=0.03)
    train_online(answers, *models, tmp_path / "whole", settings)
    with monkeypatch.context() as patch:
        cut(patch, 10)
        with pytest.raises(RuntimeError, match="cut"):
            train_online(answers, *models, tmp_path / "cut", settings)
    train_online(answers, *models, tmp_path / "cut", settings)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert sum("loss" in entry for entry in metrics(tmp_path / "whole")) == 15


def test_it_needs_room_for_a_batch_and_one_process(
    answers: Path, student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no batch of 8"):
        config(REPLAY, batch_size=8)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="in one process"):
        train_online(answers, str(student), str(teacher), tmp_path / "c", config(REPLAY))
