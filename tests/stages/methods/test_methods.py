"""Every method: its loss from full logits of two models, the data it takes, its records, and its refusals."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from tests.helpers.prompts import write_prompts
from tests.helpers.training import (
    CONFIG,
    SAMPLING,
    cut,
    largest_change,
    logits_of_two_models,
    metrics,
    same_update,
    weights,
)
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.artifacts.reader import read_artifact
from tsdkd.core import TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.config.train import OnlineConfig, ReplayConfig, TrainConfig
from tsdkd.stages.data.online import OnlineSource, make_request
from tsdkd.stages.data.source import Sample
from tsdkd.stages.engines.both_models import BothModelsEngine
from tsdkd.stages.engines.online import sample_requests
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.methods import METHODS, find_method
from tsdkd.stages.models.load import load_model
from tsdkd.stages.score.stage import score
from tsdkd.stages.train import trainer as trainer_module
from tsdkd.stages.train.stage import train_offline, train_online

Contents = Callable[[Path], dict[str, bytes]]
Runs = dict[str, Path]

FORMULAS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "supervised-kd": lambda p, q: (p * (p / q).log()).sum(-1),
    "gkd": lambda p, q: sum(0.5 * (a * (2 * a / (p + q)).log()).sum(-1) for a in (p, q)),
    "reverse-kl": lambda p, q: (q * (q / p).log()).sum(-1),
    "skew-kl": lambda p, q: (p * (p / (0.1 * p + 0.9 * q)).log()).sum(-1),
    "skew-reverse-kl": lambda p, q: (q * (q / (0.9 * p + 0.1 * q)).log()).sum(-1),
    "distillm": lambda p, q: (p * (p / (0.1 * p + 0.9 * q)).log()).sum(-1),
    "skd": lambda p, q: (p * (p / q).log()).sum(-1),
}
"""The papers' formulas per token, of the teacher's and the student's probabilities (..., vocab)."""
DATA = {
    **dict.fromkeys(("seqkd", "supervised-kd", "distillm"), "teacher"),
    "skd": "speculative",
    "minillm": "teacher-mixed",
}
"""The policy of a method's rollouts; by default the student's."""
POLICIES = ("student", "teacher", "speculative", "teacher-mixed")
TEACHER_FRACTION = 0.3


@pytest.fixture(scope="module")
def runs(student: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Rollouts and scores of ten responses, by policy."""
    directory = tmp_path_factory.mktemp("runs")
    prompts = write_prompts(directory / "prompts.jsonl", 10)
    for policy in POLICIES:
        write_rollouts(prompts, student, teacher, directory / policy, policy=policy)
        score(
            directory / policy / "rollouts", str(student), str(teacher), directory / policy / "scores", ScoreConfig(k=4)
        )
    return {policy: directory / policy for policy in POLICIES}


@pytest.fixture(scope="module")
def unseen(student: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Rollouts of other prompts, by policy."""
    directory = tmp_path_factory.mktemp("unseen")
    rows = "".join(json.dumps({"prompt": f"Is {7 * i} more than {i}?"}) + "\n" for i in range(12))
    (directory / "prompts.jsonl").write_text(rows)
    for policy in POLICIES:
        write_rollouts(directory / "prompts.jsonl", student, teacher, directory / policy, policy=policy)
    return {policy: directory / policy for policy in POLICIES}


def write_rollouts(prompts: Path, student: Path, teacher: Path, run: Path, **changes: object) -> None:
    config = replace(GenerateConfig(max_new_tokens=12, accept_k=20, teacher_fraction=TEACHER_FRACTION), **changes)
    model = None if config.policy == "teacher" else str(student)
    generate(prompts, model, run / "rollouts", config, teachers={"": str(teacher)})


def settings(name: str, **more: object) -> TrainConfig:
    return replace(CONFIG, method=name, objective=find_method(name).objective, **more)


def learn(run: Path, student: Path, output: Path, config: TrainConfig) -> None:
    scores = run / "scores" if find_method(config.method).needs_teacher else None
    train_offline(run / "rollouts", scores, str(student), output, config)


def expected(name: str, run: Path, student: Path, teacher: Path) -> float:
    return formula(name, read_artifact(run / "rollouts", "rollouts").table().to_pylist(), student, teacher)


def formula(name: str, rows: list[Sample], student: Path, teacher: Path) -> float:
    """The mean over responses of the means over their tokens, from full logits."""
    (s, t), mask = logits_of_two_models(rows, student, teacher)
    p, q = t.double().softmax(-1), s.double().softmax(-1)
    ids = torch.zeros(mask.shape, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row["response_ids"])] = torch.tensor(row["response_ids"])
    p_y, q_y = (x.gather(-1, ids.unsqueeze(-1)).squeeze(-1) for x in (p, q))
    if name == "seqkd":
        losses = -q_y.log()
    elif name == "minillm":
        teacher_fraction = TEACHER_FRACTION if {row["author"] for row in rows} == {"mixture"} else 0
        rewards = (p_y / q_y).log()
        future_rewards = torch.zeros_like(rewards)
        for i, length in enumerate(mask.sum(-1).tolist()):
            for at in range(length - 1):
                future_rewards[i, at] = rewards[i, at + 1 : length].mean()
        losses = (
            q_y
            / (teacher_fraction * p_y + (1 - teacher_fraction) * q_y)
            * (FORMULAS["reverse-kl"](p, q) - future_rewards)
        )
    else:
        losses = FORMULAS[name](p, q)
    return float((losses.where(mask, 0).sum(-1) / mask.sum(-1)).mean())


@pytest.mark.parametrize("name", sorted({*FORMULAS, "seqkd", "minillm"} - {"distillm"}))
def test_the_first_step_is_the_papers_formula(
    runs: Runs, student: Path, teacher: Path, tmp_path: Path, name: str
) -> None:
    run = runs[DATA.get(name, "student")]
    learn(run, student, tmp_path / "c", settings(name, batch_size=10))
    logged, _ = metrics(tmp_path / "c")
    assert logged["loss"] == pytest.approx(expected(name, run, student, teacher), rel=1e-4)
    assert largest_change(weights(tmp_path / "c"), weights(student)) > 1e-4
    manifest = load_manifest(tmp_path / "c")
    assert manifest.config["method"] == name
    assert {model.role for model in manifest.models} == {"student", "teacher"}
    assert find_method(name).description in ModelCard.load(tmp_path / "c" / "README.md").content


@pytest.mark.parametrize("name", sorted({*FORMULAS, "seqkd", "minillm"}))
def test_each_method_improves_on_unseen_responses(
    runs: Runs, unseen: Runs, student: Path, teacher: Path, tmp_path: Path, name: str
) -> None:
    """MiniLLM is measured by reverse KL: of its own loss only the gradient has a meaning."""
    policy, measured = DATA.get(name, "student"), {"minillm": "reverse-kl"}.get(name, name)
    plan: dict[str, object] = {"learning_rate": 3e-3, "epochs": 8, "micro_batch_size": 4, "save_steps": 100}
    if find_method(name).uses_replay:
        online = OnlineConfig(student_fraction=0, sampling=SAMPLING, replay=ReplayConfig(phi=0.5))
        config = settings(name, **plan, online=online, held_out=0.3, eval_steps=5)
        train_online(runs[policy] / "rollouts", str(student), str(teacher), tmp_path / "c", config)
    else:
        learn(runs[policy], student, tmp_path / "c", settings(name, **plan))
    before, after = (expected(measured, unseen[policy], model, teacher) for model in (student, tmp_path / "c"))
    assert after < before - 0.03


def test_minillm_learns_from_the_students_responses_too(
    runs: Runs, student: Path, teacher: Path, tmp_path: Path
) -> None:
    """Importance weights are 1 at the first step and change with the student."""
    learn(runs["student"], student, tmp_path / "c", settings("minillm", batch_size=10))
    logged, *_ = metrics(tmp_path / "c")
    assert logged["loss"] == pytest.approx(expected("minillm", runs["student"], student, teacher), rel=1e-4)
    assert logged["direct"] == pytest.approx(expected("reverse-kl", runs["student"], student, teacher), rel=1e-4)


def test_minillm_online_samples_from_both_current_models(
    student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step is the formula on tokens of both models; later steps sample from the student of that step."""
    seen: list[list[Sample]] = []
    with_responses = OnlineSource.with_responses
    monkeypatch.setattr(OnlineSource, "with_responses", lambda *given: seen.append(with_responses(*given)) or seen[-1])
    sampling = replace(SAMPLING, policy="teacher-mixed", teacher_fraction=TEACHER_FRACTION)
    config = settings("minillm", online=OnlineConfig(sampling=sampling), batch_size=10, epochs=2, learning_rate=1e-2)
    prompts = write_prompts(tmp_path / "prompts.jsonl", 10)
    train_online(prompts, str(student), str(teacher), tmp_path / "c", config)
    logged, later = metrics(tmp_path / "c")
    _, first, second = seen
    rows = [row | {"author": "mixture"} for row in first]
    together = BothModelsEngine(load_model(str(student)), load_model(str(teacher)), sampling)
    sampled = sample_requests(together, [make_request(row, (0, 0)) for row in first])
    assert [row["response_ids"] for row in rows] == [response.ids for response in sampled]
    assert [row["response_ids"] for row in first] != [row["response_ids"] for row in second]
    assert logged["loss"] == pytest.approx(formula("minillm", rows, student, teacher), rel=1e-4)
    assert "drift" not in later


def test_minillm_refuses_tokens_without_known_probabilities(
    runs: Runs, student: Path, teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    for changes, cause in (
        ({"temperature": 0.5}, "temperature was 0.5"),
        ({"top_p": 0.9, "policy": "teacher-mixed"}, "top_p was 0.9"),
    ):
        run = tmp_path / cause
        write_rollouts(prompts, student, teacher, run, **changes)
        score(run / "rollouts", str(student), str(teacher), run / "scores", ScoreConfig(k=4))
        with pytest.raises(InputError, match=cause):
            learn(run, student, tmp_path / "c", settings("minillm"))
    mixture = runs["teacher-mixed"]
    for role, models in (("student", (teacher, teacher)), ("teacher", (student, student))):
        score(mixture / "rollouts", *map(str, models), tmp_path / role, ScoreConfig(k=4))
        with pytest.raises(InputError, match=f"of another {role} than the one that sampled"):
            train_offline(mixture / "rollouts", tmp_path / role, str(student), tmp_path / "c", settings("minillm"))
    score(mixture / "rollouts", str(student), str(teacher), tmp_path / "topk", ScoreConfig(k=4, signal="topk", top_k=9))
    with pytest.raises(InputError, match="signal 'topk' do not hold the teacher's probability"):
        train_offline(mixture / "rollouts", tmp_path / "topk", str(student), tmp_path / "c", settings("minillm"))
    for online, cause in (
        (OnlineConfig(student_fraction=0.5, sampling=SAMPLING), "only from responses that are sampled"),
        (OnlineConfig(sampling=replace(SAMPLING, temperature=0.5)), "temperature was 0.5"),
        (OnlineConfig(sampling=replace(SAMPLING, engine="vllm", policy="teacher-mixed")), "need the transformers"),
    ):
        with pytest.raises(InputError, match=cause):
            train_online(
                runs["student"] / "rollouts",
                str(student),
                str(teacher),
                tmp_path / "c",
                settings("minillm", online=online),
            )
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("name", ["supervised-kd", "skew-reverse-kl"])
def test_online_and_offline_give_the_same_update(
    runs: Runs, student: Path, teacher: Path, tmp_path: Path, name: str
) -> None:
    run = runs[DATA.get(name, "student")]
    learn(run, student, tmp_path / "offline", settings(name))
    online = OnlineConfig(student_fraction=0, sampling=SAMPLING)
    train_online(run / "rollouts", str(student), str(teacher), tmp_path / "online", settings(name, online=online))
    assert same_update(weights(tmp_path / "online"), weights(tmp_path / "offline"), weights(student))


def test_responses_alone_need_no_teacher_and_resume(
    runs: Runs, student: Path, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("seqkd", held_out=0.3, eval_steps=1)
    learn(runs["teacher"], student, tmp_path / "whole", config)
    manifest = load_manifest(tmp_path / "whole")
    assert [parent.kind for parent in manifest.parents] == ["rollouts"]
    assert {"best_step", "best_cross_entropy"} <= manifest.summary.keys()
    measured = [entry for entry in metrics(tmp_path / "whole") if "eval_cross_entropy" in entry]
    assert all(entry.keys() == {"eval_cross_entropy", "eval_student_entropy", "step"} for entry in measured)
    assert "| held-out cross-entropy (nats per token) |" in (tmp_path / "whole" / "README.md").read_text()
    cut(monkeypatch, 2)
    with pytest.raises(RuntimeError, match="cut"):
        learn(runs["teacher"], student, tmp_path / "cut", config)
    monkeypatch.undo()
    learn(runs["teacher"], student, tmp_path / "cut", config)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "policy", "cause", "remedy"),
    [
        ("seqkd", "student", "responses by student", "--policy teacher"),
        ("supervised-kd", "student", "responses by student", "--policy teacher"),
        ("supervised-kd", "speculative", "responses by both", "--policy teacher"),
        ("skd", "student", "responses by student", "--policy speculative"),
        ("skd", "teacher-mixed", "responses by mixture", "--policy speculative"),
        ("minillm", "teacher", "responses by teacher", "--policy student or --policy teacher-mixed"),
        ("minillm", "speculative", "responses by both", "--policy teacher-mixed"),
    ],
)
def test_responses_by_other_authors_are_refused(
    runs: Runs, student: Path, teacher: Path, tmp_path: Path, name: str, policy: str, cause: str, remedy: str
) -> None:
    with pytest.raises(InputError, match=cause) as caught:
        learn(runs[policy], student, tmp_path / "c", settings(name))
    assert remedy in caught.value.remedy
    if (
        find_method(name).needs_teacher and name != "minillm"
    ):  # which learns online only from responses sampled during training
        online = OnlineConfig(student_fraction=0, sampling=SAMPLING)
        with pytest.raises(InputError, match=cause):
            train_online(
                runs[policy] / "rollouts", str(student), str(teacher), tmp_path / "c", settings(name, online=online)
            )
    assert not (tmp_path / "c").exists()


def test_seqkd_with_scores_is_refused(runs: Runs, student: Path, tmp_path: Path) -> None:
    """With scores it would learn from the teacher's whole distribution."""
    run = runs["teacher"]
    with pytest.raises(InputError, match="responses alone"):
        train_offline(run / "rollouts", run / "scores", str(student), tmp_path / "c", settings("seqkd"))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("name", "given"),
    [("tsdkd", {"skew": 0.2}), ("tsdkd", {"divergence": "skew-kl", "beta": 0.2}), ("distillm", {"beta": 0.2})],
)
def test_options_without_effect_are_refused(name: str, given: dict[str, object]) -> None:
    with pytest.raises(InputError, match="no effect"):
        find_method(name).with_options(given)


def test_agreement_is_a_mean_over_the_responses_with_an_opener(
    runs: Runs, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ten micro-batches of one response, the second and the seventh have no ranking; the others agree by 0.5."""
    training_forward, calls = trainer_module.DistillationTrainer.training_forward, iter(range(10))

    def ranked(self: object, *given: object, **more: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, found = training_forward(self, *given, **more)
        del found["rank_agreement"]
        return loss, found if next(calls) in {1, 6} else found | {"rank_agreement": torch.tensor(0.5)}

    monkeypatch.setattr(trainer_module.DistillationTrainer, "training_forward", ranked)
    config = replace(CONFIG, batch_size=10, micro_batch_size=1, epochs=1)
    learn(runs["student"], student, tmp_path / "c", config)
    assert metrics(tmp_path / "c")[0]["rank_agreement"] == pytest.approx(0.5)


def test_sampling_during_training_is_refused_for_other_methods(
    runs: Runs, student: Path, teacher: Path, tmp_path: Path
) -> None:
    for name, cause in (("supervised-kd", "sampled during"), ("skd", "sampled during"), ("seqkd", "responses alone")):
        config = settings(name, online=OnlineConfig(student_fraction=0.5, sampling=SAMPLING))
        with pytest.raises(InputError, match=cause):
            train_online(runs["teacher"] / "rollouts", str(student), str(teacher), tmp_path / "c", config)


def test_unknown_names_and_options_are_refused() -> None:
    with pytest.raises(InputError, match="Unknown method 'gdk'") as caught:
        TrainConfig(method="gdk")
    assert all(name in caught.value.remedy for name in METHODS)
    with pytest.raises(InputError, match="gkd has no --alpha") as caught:
        TrainConfig(method="gkd", objective=TSDKDConfig(em_weight=0, gate=False))
    assert "--beta, --temperature" in caught.value.remedy
    with pytest.raises(InputError, match="seqkd has no --temperature"):
        find_method("seqkd").with_options({"temperature": 2.0})
    assert find_method("gkd").with_options({"beta": 0.1}) == TSDKDConfig(alpha=0, em_weight=0, gate=False, beta=0.1)
    replay = OnlineConfig(student_fraction=0, replay=ReplayConfig())
    with pytest.raises(InputError, match="gkd has no replay schedule"):
        settings("gkd", online=replay)
    with pytest.raises(InputError, match="distillm needs online training"):
        settings("distillm")
    with pytest.raises(InputError, match="follows the held-out divergence"):
        settings("distillm", online=replay)
    with pytest.raises(InputError, match="decides when the student responds"):
        OnlineConfig(student_fraction=1, replay=ReplayConfig())


def test_tsdkd_released_is_the_paper_with_three_deviations() -> None:
    paper, released = find_method("tsdkd").objective, find_method("tsdkd-released").objective
    assert paper == TSDKDConfig()
    assert released == replace(paper, released=("ranking", "opener", "entropy"))


def test_the_docs_name_every_method() -> None:
    text = (Path(__file__).parents[3] / "docs" / "methods.md").read_text()
    assert all(f"| `{name}` |" in text for name in METHODS)
