"""--rollout-ahead: the next batch is sampled while this one is learned, one update behind, and resumes exactly."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.commands import run as run_command
from tests.helpers.deaths import die_at
from tests.helpers.forked_ranks import run_ranks
from tests.helpers.training import CONFIG, SAMPLING, cut, metrics, same_update, weights
from tsdkd.core import Head, TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.train import OnlineConfig, ReplayConfig, TrainConfig
from tsdkd.stages.data.batches import Batch
from tsdkd.stages.data.online import LOG_PROBS
from tsdkd.stages.data.requests import Request, Response
from tsdkd.stages.data.rollout_ahead import AheadSource
from tsdkd.stages.data.source import Sample
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.train.batch_order import MicroBatches
from tsdkd.stages.train.sampling import with_engine
from tsdkd.stages.train.settings import recorded_settings
from tsdkd.stages.train.stage import train_online
from tsdkd.stages.train.trainer import DistillationTrainer

AHEAD = replace(
    CONFIG,
    online=OnlineConfig(sampling=replace(SAMPLING, memory_fraction=0.01), rollout_ahead=1),
    learning_rate=1e-2,
    warmup_ratio=0.0,
    save_steps=1,
)


class GreedySampler:
    """Greedy responses of the student at each update, in memory until a thread asks for them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.states: list[dict[str, torch.Tensor]] = []
        self.sampled: list[list[Response]] = []

    def update(self, student: LanguageModel, requests: list[Request]) -> None:
        self.states.append({name: value.clone() for name, value in student.model.state_dict().items()})
        model = AutoModelForCausalLM.from_pretrained(self.path)
        model.load_state_dict(self.states[-1])
        self.sampled.append([greedy_response(model, request) for request in requests])

    def sample(self, requests: list[Request]) -> list[Response]:
        return self.sampled[-1]


@torch.no_grad()
def greedy_response(model: Any, request: Request) -> Response:
    ids, log_probs = list(request.prompt_ids), []
    for _ in range(4 + request.seed % 3):
        log_p = model(torch.tensor([ids])).logits[0, -1, :258].log_softmax(-1)
        ids.append(int(log_p.argmax()))
        log_probs.append(float(log_p.max()))
    return Response(ids[len(request.prompt_ids) :], "length", log_probs=log_probs)


@pytest.fixture
def sampler(student: Path, monkeypatch: pytest.MonkeyPatch) -> GreedySampler:
    sampler = GreedySampler(student)
    monkeypatch.setattr("tsdkd.stages.train.sampling.choose_engine", lambda *_, **__: "vllm")
    monkeypatch.setattr("tsdkd.stages.train.stage.open_sampler", lambda *_: nullcontext(sampler))
    return sampler


def learn(
    prompts: Path, student: Path, teacher: Path, output: Path, config: TrainConfig = AHEAD
) -> dict[str, torch.Tensor]:
    train_online(prompts, str(student), str(teacher), output, config)
    return weights(output)


@pytest.mark.parametrize("packed", [False, True])
def test_each_step_learns_what_the_student_of_the_step_before_sampled(
    prompts: Path,
    student: Path,
    teacher: Path,
    tmp_path: Path,
    sampler: GreedySampler,
    packed: bool,
) -> None:
    config = replace(AHEAD, micro_batch_size=None, micro_batch_tokens=150) if packed else AHEAD
    learn(prompts, student, teacher, tmp_path / "c", config)
    assert len(sampler.states) == 6  # two epochs of ten prompts, four a step
    same = [
        all(torch.equal(now[name], then[name]) for name in now)
        for then, now in zip(sampler.states, sampler.states[1:], strict=False)
    ]
    assert same == [True, False, False, False, False]
    assert [len(step) for step in sampler.sampled] == [4, 4, 2, 4, 4, 2]
    learned = metrics(tmp_path / "c")
    assert [entry["rollout_age"] for entry in learned] == [0, 1, 1, 1, 1, 1]
    assert abs(learned[0]["drift"]) < 1e-5
    assert all(abs(entry["drift"]) > 1e-3 for entry in learned[1:])
    lengths = [sum(len(response.ids) for response in step) / len(step) for step in sampler.sampled]
    assert [entry["response_length"] for entry in learned] == pytest.approx(lengths)


def test_recorded_responses_keep_their_place_beside_those_sampled_ahead(
    prompts: Path, student: Path, teacher: Path, tmp_path: Path, sampler: GreedySampler
) -> None:
    """The drift is that of the sampled responses alone; recorded ones do not say how they were sampled."""
    rollouts = generate(prompts, str(student), tmp_path / "rollouts", GenerateConfig(max_new_tokens=12))
    recorded = [row["response_ids"] for row in rollouts.table(["response_ids"]).to_pylist()]
    learned: list[Sample] = []
    collate = DistillationTrainer._collate

    def spy(self: DistillationTrainer, samples: list[Sample]) -> Batch:
        learned.extend(samples)
        return collate(self, samples)

    command = ["train", "--run", tmp_path, "--rollouts", tmp_path / "rollouts", "--lambda", 0.5, "--rollout-ahead", 1]
    command += ["--student", student, "--teacher", teacher, "--k", 4, "--precision", "float32", "--epochs", 2]
    with patch.object(DistillationTrainer, "_collate", spy):
        run_command(*command, "--batch-size", 4, "--memory-fraction", 0.01, "--max-new-tokens", 12)
    sampled = [response.ids for step in sampler.sampled for response in step]
    assert [s["response_ids"] for s in learned if LOG_PROBS in s] == sampled
    others = [s["response_ids"] for s in learned if LOG_PROBS not in s]
    assert len(others) + len(sampled) == 20
    assert all(ids in recorded for ids in others)
    assert 0 < len(sampled) < 20
    assert all(abs(entry.get("drift", 0)) < 1 for entry in metrics(tmp_path / "checkpoint"))


@pytest.mark.parametrize("cut_at", [1, 3])
def test_a_cut_run_learns_the_responses_that_were_sampled_before(
    prompts: Path,
    student: Path,
    teacher: Path,
    tmp_path: Path,
    sampler: GreedySampler,
    contents: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
    cut_at: int,
) -> None:
    config = replace(AHEAD, held_out=0.3, eval_steps=1, objective=TSDKDConfig(k=4, opener="adaptive"))
    learn(prompts, student, teacher, tmp_path / "whole", config)
    with monkeypatch.context() as context:
        cut(context, cut_at)
        with pytest.raises(RuntimeError, match="cut"):
            learn(prompts, student, teacher, tmp_path / "cut", config)
    learn(prompts, student, teacher, tmp_path / "cut", config)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_one_process_continues_what_two_sampled_ahead(
    prompts: Path, student: Path, teacher: Path, tmp_path: Path, sampler: GreedySampler
) -> None:
    one = learn(prompts, student, teacher, tmp_path / "one")

    def work() -> None:
        train_online(prompts, str(student), str(teacher), tmp_path / "two", AHEAD)

    assert run_ranks(work, 2, first=die_at(DistillationTrainer, "compute_loss", 3))[0] == -9
    assert (tmp_path / "two" / "resume" / "checkpoint-2").is_dir()
    assert same_update(learn(prompts, student, teacher, tmp_path / "two"), one, weights(student))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_batch_has_the_log_probs_of_its_sampled_tokens_beside_what_the_teacher_recorded(top_p: float) -> None:
    """A nucleus makes some of its tokens impossible for a student that has moved: nothing is compared."""
    recorded = {"owners": torch.tensor([0, 0, 1, 1])}
    teacher = Mock(recorded=lambda _: recorded, signal=lambda batch: batch["recorded"])
    source = AheadSource([], teacher, Mock(), 1.0, replace(SAMPLING, temperature=2.0, top_p=top_p))
    samples = [
        {"response_ids": [5, 6, 7], "response_mask": [True, False, True], "prompt_ids": [1]},
        {"response_ids": [0, 2], "response_mask": None, "prompt_ids": [1], LOG_PROBS: [-1.0, -3.0]},
    ]
    batch = {"recorded": source.recorded(samples)}
    assert source.signal(batch) == recorded
    snapshot = source.scoring_snapshot(batch)
    if top_p < 1:
        assert snapshot is None
        return
    assert snapshot is not None
    logits = torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [1.0, 2.0, 3.0], [4.0, 0, 2.0]])
    now = (logits[2:] / 2.0).log_softmax(-1)
    expected = (-1.0 - now[0, 0] + -3.0 - now[1, 2]) / 2
    drift = snapshot.compare(logits, Head(torch.eye(3)))["drift"]
    assert drift.item() == pytest.approx(expected.item())


def test_the_micro_batches_of_a_step_are_known_before_it() -> None:
    for ranks in ((0, 1), (1, 2)):
        batches = MicroBatches(11, 2, 5, *ranks)
        epochs = []
        for epoch in range(2):
            batches.set_epoch(epoch)
            epochs.append(list(batches))
        steps = [epoch[i : i + 2] for epoch in epochs for i in range(0, len(epoch), 2)]
        assert [batches.of_step(step, 2) for step in range(len(steps))] == steps


def test_sampling_ahead_is_refused_where_nothing_overlaps(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="transformers samples in the process that learns") as caught:
        with_engine(OnlineConfig(sampling=SAMPLING, rollout_ahead=1), "float32", SilentObserver())
    assert "--engine vllm" in caught.value.remedy
    with pytest.raises(InputError, match="replay"):
        OnlineConfig(student_fraction=0, replay=ReplayConfig(), rollout_ahead=1)
    monkeypatch.setattr("tsdkd.stages.train.sampling.choose_engine", lambda *_, **__: "vllm")
    monkeypatch.setattr("tsdkd.stages.train.sampling.default_device", lambda: "cuda")
    with pytest.raises(InputError, match="sleeps on the student's GPU") as caught:
        with_engine(OnlineConfig(sampling=SAMPLING, rollout_ahead=1), "float32", SilentObserver())
    assert "--rollout-gpus" in caught.value.remedy


def test_only_a_run_that_samples_ahead_records_it() -> None:
    recorded = [recorded_settings(replace(AHEAD, online=OnlineConfig(rollout_ahead=ahead))) for ahead in (0, 1)]
    assert "rollout_ahead" not in recorded[0]["online"]
    assert recorded[1]["online"]["rollout_ahead"] == 1
