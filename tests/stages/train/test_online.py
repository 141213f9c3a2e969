"""Online training: the student responds with its current weights, and the update is the objective's."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.training import (
    CONFIG,
    SAMPLING,
    RecordingObserver,
    cut,
    loss_of_two_models,
    metrics,
    same_update,
    weights,
)
from tsdkd.core import TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import OnlineConfig, TrainConfig
from tsdkd.stages.data.held_out import split_held_out
from tsdkd.stages.data.online import OnlineSource, samples_from_prompts
from tsdkd.stages.data.online_teachers import LoadedTeacher
from tsdkd.stages.data.prompts import Prompts
from tsdkd.stages.data.requests import Request, Response
from tsdkd.stages.data.source import Sample
from tsdkd.stages.engines.online import LocalSampler
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.spec import load_spec
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.score.stage import score
from tsdkd.stages.train.sampling import open_sampler, with_engine
from tsdkd.stages.train.settings import recorded_settings
from tsdkd.stages.train.stage import train_offline, train_online

Contents = Callable[[Path], dict[str, bytes]]
ONLINE = replace(CONFIG, online=OnlineConfig(sampling=SAMPLING))


def learn(
    data: Path, student: Path, teacher: Path, output: Path, config: TrainConfig = ONLINE
) -> dict[str, torch.Tensor]:
    train_online(data, str(student), str(teacher), output, config)
    return weights(output)


def test_the_first_step_is_the_objective_on_the_students_responses(
    prompts: Path, student: Path, teacher: Path, tmp_path: Path, responses: list[list[Sample]]
) -> None:
    learn(prompts, student, teacher, tmp_path / "c", replace(ONLINE, batch_size=10, epochs=1))
    (_, rows) = responses
    loss, _ = loss_of_two_models(rows, student, teacher)
    (logged,) = metrics(tmp_path / "c")
    end_ids = load_model(str(student)).end_ids
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert logged["truncated"] == pytest.approx(sum(row["response_ids"][-1] not in end_ids for row in rows) / 10)


def test_responses_come_from_the_current_weights(
    prompts: Path, student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy responses of a step are those of the weights that the step begins with, and these weights change."""
    states, found = [], []
    with_responses = OnlineSource.with_responses

    def spy(self: OnlineSource, samples: list[Sample], learner: object, *more: object) -> list[Sample]:
        states.append({name: value.clone() for name, value in learner.model.state_dict().items()})
        found.append(with_responses(self, samples, learner, *more))
        return found[-1]

    monkeypatch.setattr(OnlineSource, "with_responses", spy)
    config = replace(
        ONLINE, online=OnlineConfig(sampling=replace(SAMPLING, temperature=0)), learning_rate=1e-2, micro_batch_size=4
    )
    learn(prompts, student, teacher, tmp_path / "c", config)
    steps = list(zip(states, found, strict=True))[1:]  # the first call is for held-out prompts: none
    changed = 0
    for state, samples in (steps[0], steps[-1]):
        model = AutoModelForCausalLM.from_pretrained(student)
        for number, sample in enumerate(samples):
            replies = {}
            for name, weights_ in (("then", state), ("start", steps[0][0])):
                model.load_state_dict(weights_)
                ids = torch.tensor([sample["prompt_ids"]])
                reply = model.generate(ids, max_new_tokens=12, do_sample=False, suppress_tokens=list(range(258, 264)))
                replies[name] = reply[0, ids.shape[1] :].tolist()
            assert sample["response_ids"] == replies["then"], number
            changed += replies["then"] != replies["start"]
    assert changed


def test_recorded_responses_give_the_same_update_online_and_offline(
    prompts: Path, student: Path, teacher: Path, tmp_path: Path
) -> None:
    """lambda = 0 on rollouts: the same tokens, with hidden states of the teacher that are computed or recorded."""
    generate(prompts, str(student), tmp_path / "rollouts", GenerateConfig(max_new_tokens=12))
    score(tmp_path / "rollouts", str(student), str(teacher), tmp_path / "scores", ScoreConfig(k=4))
    train_offline(tmp_path / "rollouts", tmp_path / "scores", str(student), tmp_path / "offline", CONFIG)
    online = learn(
        tmp_path / "rollouts",
        student,
        teacher,
        tmp_path / "online",
        replace(ONLINE, online=OnlineConfig(student_fraction=0, sampling=SAMPLING)),
    )
    assert same_update(online, weights(tmp_path / "offline"), weights(student))


def test_lambda_is_the_fraction_of_prompts_that_the_student_responds_to(
    student: Path, teacher: Path, tmp_path: Path
) -> None:
    reader = load_model(str(student))
    samples = [
        {"sample_id": str(i), "prompt_id": str(i), "prompt_ids": [65, 66], "response_ids": [7], "finish_reason": "stop"}
        | {"response_mask": [True]}
        for i in range(200)
    ]
    for fraction, least, most in ((0.0, 0, 0), (0.3, 40, 80), (1.0, 200, 200)):
        sampler = LocalSampler(replace(SAMPLING, max_new_tokens=2))
        source = OnlineSource(samples, LoadedTeacher(load_model(str(teacher))), sampler, fraction)
        steps = [source.with_responses(samples, reader, (0, step)) for step in (0, 1)]
        assert all((s["response_mask"] is None) == (s["response_ids"] != [7]) for step in steps for s in step)
        sampled = [{s["sample_id"] for s in step if s["response_ids"] != [7]} for step in steps]
        assert all(least <= len(ids) <= most for ids in sampled)
        assert (sampled[0] != sampled[1]) == (fraction == 0.3)


@pytest.mark.parametrize("cut_at", [1, 3])
def test_a_cut_online_run_ends_with_the_same_bytes(
    prompts: Path,
    student: Path,
    teacher: Path,
    tmp_path: Path,
    contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
    cut_at: int,
) -> None:
    config = replace(ONLINE, held_out=0.3, eval_steps=1, objective=TSDKDConfig(k=4, opener="adaptive"))
    learn(prompts, student, teacher, tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        cut(patch, cut_at)
        with pytest.raises(RuntimeError, match="cut"):
            learn(prompts, student, teacher, tmp_path / "cut", config)
    learn(prompts, student, teacher, tmp_path / "cut", config)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize("packed", [False, True])
def test_stop_strings_end_the_responses_of_a_step(
    prompts: Path, student: Path, teacher: Path, tmp_path: Path, responses: list[list[Sample]], packed: bool
) -> None:
    """The text up to the stop string is learned, and counts as ended."""
    config = replace(ONLINE, batch_size=10, epochs=1, online=OnlineConfig(sampling=SAMPLING))
    config = replace(config, micro_batch_size=None, micro_batch_tokens=200) if packed else config
    learn(prompts, student, teacher, tmp_path / "whole", config)
    whole = {sample["sample_id"]: sample["response_ids"] for sample in responses[-1]}
    tokenizer = load_model(str(student)).tokenizer
    stop = next(text[2] for text in map(tokenizer.decode, whole.values()) if len(text) > 4 and text[2].isascii())
    online = OnlineConfig(sampling=replace(SAMPLING, stop=(stop,)))
    learn(prompts, student, teacher, tmp_path / "stopped", replace(config, online=online))
    cut = [sample for sample in responses[-1] if stop in tokenizer.decode(sample["response_ids"])]
    assert cut
    for sample in responses[-1]:
        ids = sample["response_ids"]
        assert ids == whole[sample["sample_id"]][: len(ids)]
        if sample in cut:
            assert tokenizer.decode(ids).index(stop) == len(tokenizer.decode(ids)) - 1
            assert sample["finish_reason"] == "stop"
    (logged,) = metrics(tmp_path / "stopped")
    assert logged["truncated"] == pytest.approx(sum(s["finish_reason"] == "length" for s in responses[-1]) / 10)


def test_online_training_refuses(
    prompts: Path, student: Path, teacher: Path, other_family: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"lambda is 1\.5"):
        OnlineConfig(student_fraction=1.5)
    with pytest.raises(InputError, match="no recorded responses"):
        learn(
            prompts,
            student,
            teacher,
            tmp_path / "c",
            replace(ONLINE, online=OnlineConfig(student_fraction=0.5, sampling=SAMPLING)),
        )
    with pytest.raises(InputError, match="different tokenizers"):
        learn(prompts, student, other_family, tmp_path / "c")
    generate(prompts, str(other_family), tmp_path / "rollouts", GenerateConfig(max_new_tokens=4))
    with pytest.raises(InputError, match="different tokenizers"):
        learn(tmp_path / "rollouts", student, teacher, tmp_path / "c")
    with pytest.raises(InputError, match="can reach 6"):
        learn(
            prompts,
            student,
            teacher,
            tmp_path / "c",
            replace(ONLINE, online=OnlineConfig(sampling=replace(SAMPLING, max_new_tokens=600))),
        )
    with pytest.raises(InputError, match="longer than 1 tokens"):
        samples_from_prompts(Prompts(prompts), load_model(str(student)).tokenizer, 1)
    assert not (tmp_path / "c").exists()


def test_offline_training_logs_how_stale_its_scores_are(
    prompts: Path, student: Path, teacher: Path, tmp_path: Path
) -> None:
    """Drift is 0 before the first update and large after large updates."""
    generate(prompts, str(student), tmp_path / "rollouts", GenerateConfig(max_new_tokens=12))
    score(tmp_path / "rollouts", str(student), str(teacher), tmp_path / "scores", ScoreConfig(k=4))
    config = replace(CONFIG, learning_rate=0.03, epochs=3)
    train_offline(tmp_path / "rollouts", tmp_path / "scores", str(student), tmp_path / "c", config)
    first, *_, last = metrics(tmp_path / "c")
    assert first["candidate_overlap"] == 1
    assert first["drift"] == pytest.approx(0, abs=1e-5)
    assert last["candidate_overlap"] < 0.9
    assert last["drift"] > 0.05


class RecordingSampler:
    """Records its calls, and gives every request the same response."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str]]] = []

    def update(self, student: object, requests: list[Request]) -> None:
        self.calls.append(("update", [request.sample_id for request in requests]))

    def sample(self, requests: list[Request]) -> list[Response]:
        self.calls.append(("sample", [request.sample_id for request in requests]))
        return [Response([9], "stop") for _ in requests]


@pytest.mark.parametrize(("on_other_rank", "expected"), [(True, [("update", []), ("sample", [])]), (False, [])])
def test_a_rank_without_requests_takes_part_in_the_update_of_the_weights(
    student: Path, monkeypatch: pytest.MonkeyPatch, on_other_rank: bool, expected: list[object]
) -> None:
    """The ranks gather a sharded student together; without a request on any rank nothing is gathered."""
    monkeypatch.setattr("tsdkd.stages.data.online.gather", lambda own: [*own, on_other_rank])
    sampler, reader = RecordingSampler(), load_model(str(student))
    source = OnlineSource([], LoadedTeacher(reader), sampler, 1.0)
    assert source.with_responses([], reader, (0, 1)) == []
    assert sampler.calls == expected


@pytest.mark.parametrize("number", [0, 1])
def test_rank_0_alone_samples_held_out_responses(
    prompts: Path,
    student: Path,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    responses: list[list[Sample]],
    number: int,
) -> None:
    monkeypatch.setattr("tsdkd.stages.train.stage.rank", lambda: number)
    given = {"response_ids": [9], "finish_reason": "stop", "response_mask": None}
    others = [{"sample_id": str(i), "prompt_id": str(i), "prompt_ids": [65]} | given for i in range(3)]
    monkeypatch.setattr("tsdkd.stages.train.stage.gather", lambda own: own or others)
    learn(prompts, student, teacher, tmp_path / "c", replace(ONLINE, epochs=1, held_out=0.3, eval_steps=1))
    assert bool(responses[0]) == (number == 0)
    assert any("eval_kl" in entry for entry in metrics(tmp_path / "c"))


def test_places_of_vllm_are_refused_where_it_does_not_sample() -> None:
    observer = SilentObserver()
    with pytest.raises(InputError, match="both given"):
        OnlineConfig(rollout_url="http://127.0.0.1:8000", rollout_gpus=1)
    for place in ({"rollout_url": "http://127.0.0.1:8000"}, {"rollout_gpus": 1}):
        online = OnlineConfig(sampling=SAMPLING, **place)
        mixed = replace(online, sampling=replace(SAMPLING, policy="teacher-mixed", teacher_fraction=0.2))
        for given, missing in ((online, "--engine vllm"), (mixed, "--engine vllm and --teacher-fraction 0")):
            with pytest.raises(InputError, match="needs vLLM, but") as caught:
                with_engine(given, "float32", observer)
            assert caught.value.remedy.endswith(f"or give {missing}.")
        with pytest.raises(InputError, match="--quantize") as caught:
            with_engine(replace(online, sampling=GenerateConfig()), "float32", observer, quantized=True)
        assert "--rollout" in caught.value.remedy
    auto = replace(SAMPLING, engine="auto")
    assert (
        with_engine(OnlineConfig(sampling=auto, rollout_url="http://x"), "float32", observer).sampling.engine == "vllm"
    )
    with pytest.raises(InputError, match="vLLM is not installed"):
        with_engine(OnlineConfig(sampling=auto, rollout_gpus=1), "float32", observer)


def test_vllm_starts_only_if_responses_are_sampled(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, spec, observer = load_model(str(student)), load_spec(str(student)), RecordingObserver()
    monkeypatch.setattr("tsdkd.stages.train.sampling.open_vllm_sampler", lambda *_: nullcontext("vLLM"))
    with_vllm = replace(SAMPLING, engine="vllm")
    samplers = []
    for student_fraction in (0, 1):
        online = OnlineConfig(student_fraction=student_fraction, sampling=with_vllm)
        with open_sampler(spec, reader, LoadedTeacher(reader), online, None, 64, observer) as sampler:
            samplers.append(sampler)
        with_engine(replace(online, sampling=SAMPLING), "float32", observer)
    assert isinstance(samplers[0], LocalSampler)
    assert samplers[1] == "vLLM"
    assert [message.split()[0] for message in observer.messages] == ["No", "Responses"]


def test_the_same_prompts_are_held_out_whatever_the_seed(prompts: Path, student: Path, teacher: Path) -> None:
    reader = load_model(str(student))
    samples, _ = samples_from_prompts(Prompts(prompts), reader.tokenizer, 512)
    source = OnlineSource(samples, LoadedTeacher(reader), LocalSampler(SAMPLING), 1.0)
    trained, held_out = split_held_out(source, 0.5)
    assert sorted(trained + held_out) == list(range(10))
    fewer = OnlineSource(samples[3:], LoadedTeacher(reader), LocalSampler(SAMPLING), 1.0)
    assert {fewer.prompt_id(i) for i in split_held_out(fewer, 0.5)[1]} == {
        source.prompt_id(i) for i in held_out if i >= 3
    }
    with pytest.raises(InputError, match="hold out 0 of 10 responses"):
        split_held_out(source, 1e-9)


def test_settings_that_do_not_change_the_result_are_not_recorded() -> None:
    base = recorded_settings(ONLINE)
    for other in (
        replace(ONLINE, save_steps=7, trackers=("tensorboard",)),
        replace(ONLINE, online=replace(ONLINE.online, teacher_device="cpu")),
        replace(ONLINE, online=replace(ONLINE.online, rollout_url="http://127.0.0.1:8000")),
        replace(ONLINE, online=replace(ONLINE.online, rollout_gpus=2)),
        replace(ONLINE, online=replace(ONLINE.online, sampling=replace(SAMPLING, memory_fraction=0.2))),
    ):
        assert recorded_settings(other) == base
    stopping = replace(ONLINE, stop_on_degeneration=True)
    assert recorded_settings(stopping) != recorded_settings(replace(stopping, save_steps=7))
    assert recorded_settings(replace(ONLINE, online=replace(ONLINE.online, student_fraction=0.5))) != base
