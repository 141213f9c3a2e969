"""Offline training from several teachers: each response learns from its own, and is measured against it."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.models import save_tiny_model
from tests.helpers.scored_runs import FIELDS, rollouts_of_one, sampled_run
from tests.helpers.training import CONFIG, OBJECTIVE, learn, metrics
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.core import SeveralTeachers, token_selective_loss_from_hidden
from tsdkd.errors import ArtifactError
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data import offline
from tsdkd.stages.data.batches import predicting_hidden
from tsdkd.stages.data.held_out import HeldOut, measure_held_out
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.data.source import collate
from tsdkd.stages.eval.stage import evaluate
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.load import load_model
from tsdkd.stages.score.stage import score

Grads = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def teachers(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    other = save_tiny_model(tmp_path_factory.mktemp("teachers") / "other", seed=7, layers=3, width=64)
    return {"math": str(teacher), "code": str(other)}


@pytest.fixture(scope="module")
def several(student: Path, teachers: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both teachers, and runs of each one's responses alone."""
    run = sampled_run(tmp_path_factory.mktemp("several"), student)
    score(run / "rollouts", str(student), teachers, run / "scores", ScoreConfig(k=4))
    for name, model in teachers.items():
        own = rollouts_of_one(run / "rollouts", name, run / name / "rollouts")
        score(own, str(student), model, run / name / "scores", ScoreConfig(k=4))
    return run


def gradient(student: LanguageModel, run: Path, *, packed: bool, factor: float = 1.0) -> Grads:
    """The gradient of the objective of all responses of a run, times a factor."""
    source = OfflineSource(run / "rollouts", run / "scores")
    batch = collate([source[i] for i in range(len(source))], source, packed=packed)
    signal = source.signal(batch)
    assert isinstance(signal, SeveralTeachers) == (len(source) == len(FIELDS))
    student.model.zero_grad()
    hidden = predicting_hidden(student, batch)
    layer = student.model.get_output_embeddings()
    head = replace(student.head, weight=layer.weight)
    loss, _ = token_selective_loss_from_hidden(hidden, head, signal, batch["response_mask"], OBJECTIVE)
    (factor * loss).backward()
    return {name: value.grad.clone() for name, value in student.model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_is_the_mean_over_responses_of_their_own_teachers(
    several: Path, student: Path, teachers: dict[str, str], tmp_path: Path, packed: bool
) -> None:
    model = load_model(str(student), "float32")
    fractions = {name: FIELDS.count(name) / len(FIELDS) for name in teachers}
    alone = [gradient(model, several / name, packed=packed, factor=fractions[name]) for name in teachers]
    together = gradient(model, several, packed=packed)
    expected = {name: sum(grads[name] for grads in alone) for name in together}
    for name, grad in together.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)
    sizes = {"micro_batch_size": None, "micro_batch_tokens": 200} if packed else {}
    learn(several, student, tmp_path / "c", replace(CONFIG, batch_size=10, epochs=1, **sizes))
    (step,) = metrics(tmp_path / "c")
    norm = sum(float(grad.square().sum()) for grad in expected.values()) ** 0.5
    assert set(load_manifest(tmp_path / "c").teachers) == {"code", "math"}
    assert step["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_recorded_scores_are_freed_with_their_run(several: Path) -> None:
    """With the heads of their teachers on the device that has trained."""
    source = OfflineSource(several / "rollouts", several / "scores")
    living = weakref.ref(source)
    assert len(source.signal(collate([source[0]], source)))
    del source
    gc.collect()
    assert living() is None


def test_heads_that_compare_different_ids_are_damaged(several: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = offline.load_head
    monkeypatch.setattr(offline, "load_head", lambda path: replace(load(path), vocab_size=250 + ("-1" in path.name)))
    with pytest.raises(ArtifactError, match="different numbers of ids"):
        OfflineSource(several / "rollouts", several / "scores")


def test_held_out_values_by_teacher_are_those_of_its_responses_alone(several: Path, student: Path) -> None:
    model = load_model(str(student), "float32")
    source = OfflineSource(several / "rollouts", several / "scores")
    found = measure_held_out(model, model.head, HeldOut(source, range(10)), 128)
    for name, values in found.pop("teachers").items():
        own = [i for i in range(10) if FIELDS[i] == name]
        alone = measure_held_out(model, model.head, HeldOut(source, own), 128)
        assert alone.pop("teachers")[name] == alone
        assert values == pytest.approx(alone, rel=1e-5)
        one = OfflineSource(several / name / "rollouts", several / name / "scores")
        by_itself = measure_held_out(model, model.head, HeldOut(one, range(len(one))), 128)
        assert values == pytest.approx(by_itself, rel=1e-5)
    assert found["responses"] == 10


def test_the_log_and_the_summary_hold_the_held_out_values_of_each_teacher(
    several: Path, student: Path, tmp_path: Path
) -> None:
    learn(several, student, tmp_path / "c", replace(CONFIG, held_out=0.7, eval_steps=1, epochs=2))
    evaluations = [entry for entry in metrics(tmp_path / "c") if "eval_kl" in entry]
    summary = load_manifest(tmp_path / "c").summary
    best = next(entry for entry in evaluations if entry["step"] == summary["best_step"])
    tokens = {name: values["tokens"] for name, values in summary["teachers"].items()}
    assert set(tokens) == {"code", "math"}
    for entry in evaluations:
        weighted = sum(tokens[name] * entry[f"eval_kl/{name}"] for name in tokens)
        assert entry["eval_kl"] == pytest.approx(weighted / sum(tokens.values()))
    for name, values in summary["teachers"].items():
        for key in ("kl", "top1_agreement"):
            positions = {f"eval_{key}_first": evaluations[0], f"eval_{key}_last": evaluations[-1], f"best_{key}": best}
            assert {position: values[position] for position in positions} == {
                position: entry[f"eval_{key}/{name}"] for position, entry in positions.items()
            }


def test_results_hold_the_held_out_values_of_each_teacher(several: Path, student: Path, tmp_path: Path) -> None:
    artifact = evaluate(str(student), tmp_path / "r", EvalConfig(("embedded",), limit=1), held_out=several)
    found = artifact.manifest.summary["held_out"]
    by_teacher = found["teachers"]
    assert {name: values["responses"] for name, values in by_teacher.items()} == {"code": 6, "math": 4}
    weighted = sum(values["tokens"] * values["kl"] for values in by_teacher.values())
    assert found["kl"] == pytest.approx(weighted / found["tokens"])
