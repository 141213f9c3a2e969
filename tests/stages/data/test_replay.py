"""DistiLLM's schedule: computed by hand, in a training run, and in a run that is interrupted and resumed."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.prompts import write_prompts
from tests.helpers.training import CONFIG, SAMPLING, cut, metrics
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.train import OnlineConfig, ReplayConfig, TrainConfig
from tsdkd.stages.data.replay import ReplaySchedule, ReplaySource
from tsdkd.stages.data.source import Sample
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.methods import find_method
from tsdkd.stages.train.stage import train_online

Contents = Callable[[Path], dict[str, bytes]]
REPLAY = ReplayConfig(phi=0.6, replay_tolerance=0.0, replay_capacity=4)


def config(replay: ReplayConfig, **more: object) -> TrainConfig:
    online = OnlineConfig(student_fraction=0, sampling=SAMPLING, replay=replay)
    more = {"epochs": 3, "batch_size": 2, "held_out": 0.3, "eval_steps": 3} | more
    return replace(CONFIG, method="distillm", objective=find_method("distillm").objective, online=online, **more)


@pytest.fixture(scope="module")
def recorded(student: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's rollouts."""
    path = tmp_path_factory.mktemp("recorded")
    prompts = write_prompts(path / "prompts.jsonl", 10)
    config = GenerateConfig(policy="teacher", max_new_tokens=12)
    generate(prompts, None, path / "rollouts", config, teachers={"": str(teacher)})
    return path / "rollouts"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[list[int]]]]:
    """The schedule's choice and the responses of each training step."""
    steps: list[tuple[str, list[list[int]]]] = []
    choose, respond = ReplaySchedule.choose_responses, ReplaySource.with_responses
    choices: list[str] = []

    def record_choice(self: ReplaySchedule, *args: float) -> str:
        choices.append(choose(self, *args))
        return choices[-1]

    def record_step(self: ReplaySource, *args: object) -> list[Sample]:
        samples = respond(self, *args)
        steps.append((choices[-1], [sample["response_ids"] for sample in samples]))
        return samples

    monkeypatch.setattr(ReplaySchedule, "choose_responses", record_choice)
    monkeypatch.setattr(ReplaySource, "with_responses", record_step)
    return steps


@pytest.mark.parametrize(
    ("draw", "progress", "full", "choice"),
    [
        (0.0, 0.0, True, "sampled"),
        (0.39, 0.5, True, "replayed"),  # phi is 0.4, and half of it is for sampled responses
        (0.19, 0.5, True, "sampled"),
        (0.39, 0.5, False, "sampled"),  # the replay buffer is not full
        (0.41, 0.5, False, "recorded"),
        (0.41, 0.0, True, "recorded"),
        (0.01, 1.0, True, "replayed"),
    ],
)
def test_a_draw_decides_the_responses(draw: float, progress: float, full: bool, choice: str) -> None:
    schedule = ReplaySchedule(ReplayConfig(phi=0.4, replay_capacity=2))
    schedule.replay_buffer.extend([{}, {}] if full else [{}])
    assert schedule.choose_responses(draw, progress) == choice


def test_phi_rises_when_the_divergence_reaches_the_threshold() -> None:
    """Tolerance 0.1, first reference 1.0: 1.1 and then 1.3 reach the threshold and become the reference."""
    schedule = ReplaySchedule(ReplayConfig(replay_tolerance=0.1))
    phis = []
    for divergence in (1.0, 1.05, 1.1, 1.15, 0.5, 1.3):
        schedule.update(divergence)
        phis.append(schedule.phi)
    assert phis == pytest.approx([0, 0, 0.1, 0.1, 0.1, 0.2])
    for divergence in range(2, 40):
        schedule.update(divergence)
    assert schedule.phi == 1


def test_a_full_replay_buffer_drops_its_oldest_response() -> None:
    schedule = ReplaySchedule(ReplayConfig(replay_capacity=2))
    schedule.replay_buffer.extend([{"sample_id": name} for name in "abc"])
    assert [sample["sample_id"] for sample in schedule.replay_buffer] == ["b", "c"]


def test_a_restored_schedule_continues_like_the_saved_one() -> None:
    schedule, other = (ReplaySchedule(ReplayConfig(replay_tolerance=0.1)) for _ in range(2))
    schedule.replay_buffer.append({"sample_id": "a"})
    for divergence in (1.0, 1.3):
        schedule.update(divergence)
    other.load_state_dict(schedule.state_dict())
    assert (other.phi, other.reference, list(other.replay_buffer)) == (0.1, 1.3, [{"sample_id": "a"}])
    for each in (schedule, other):
        each.update(float("nan"))  # ignored
        each.update(1.35)
    assert other.phi == schedule.phi == 0.1


def test_a_run_trains_on_recorded_sampled_and_replayed_responses(
    recorded: Path, student: Path, teacher: Path, tmp_path: Path, steps: list[tuple[str, list[list[int]]]]
) -> None:
    train_online(recorded, str(student), str(teacher), tmp_path / "c", config(REPLAY))
    assert set(Counter(choice for choice, _ in steps)) == {"recorded", "sampled", "replayed"}
    sampled: list[list[int]] = []
    for choice, responses in steps:
        if choice == "sampled":
            sampled += responses
        if choice == "replayed":
            assert all(response in sampled[-REPLAY.replay_capacity :] for response in responses)


def test_without_phi_a_run_trains_on_recorded_responses_until_the_divergence_rises(
    recorded: Path, student: Path, teacher: Path, tmp_path: Path, steps: list[tuple[str, list[list[int]]]]
) -> None:
    """The learning rate is so high that the divergence rises after a few steps."""
    harmful = config(replace(REPLAY, phi=0.0, phi_step=1.0), learning_rate=0.3, eval_steps=2)
    train_online(recorded, str(student), str(teacher), tmp_path / "c", harmful)
    choices = [choice for choice, _ in steps]
    assert choices[:4] == ["recorded"] * 4  # the first measurement is the reference
    assert "recorded" not in choices[-2:]
    steps.clear()
    train_online(
        recorded,
        str(student),
        str(teacher),
        tmp_path / "d",
        config(replace(REPLAY, phi=0.0, replay_tolerance=99), epochs=1),
    )
    assert {choice for choice, _ in steps} == {"recorded"}


def test_an_interrupted_run_ends_with_the_same_bytes(
    recorded: Path,
    student: Path,
    teacher: Path,
    tmp_path: Path,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each saved step holds phi, the reference and the replay buffer."""
    models, settings = (str(student), str(teacher)), config(replace(REPLAY, phi_step=0.3), learning_rate=0.03)
    train_online(recorded, *models, tmp_path / "whole", settings)
    with monkeypatch.context() as patch:
        cut(patch, 10)
        with pytest.raises(RuntimeError, match="cut"):
            train_online(recorded, *models, tmp_path / "cut", settings)
    train_online(recorded, *models, tmp_path / "cut", settings)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert sum("loss" in entry for entry in metrics(tmp_path / "whole")) == 15


def test_a_small_replay_buffer_and_several_ranks_are_refused(
    recorded: Path, student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="A replay buffer of 4 responses cannot fill a batch of 8"):
        config(REPLAY, batch_size=8)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="in one process"):
        train_online(recorded, str(student), str(teacher), tmp_path / "c", config(REPLAY))
