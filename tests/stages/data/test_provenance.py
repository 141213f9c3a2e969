"""Provenance follows from manifests, staleness from the student's own predictions."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tsdkd.artifacts.manifest import SERVED, Manifest, ModelRecord, Part, load_manifest, save_manifest
from tsdkd.stages.config.prune import PruneConfig
from tsdkd.stages.config.train import TrainConfig
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.data.provenance import Fact, Provenance, Staleness, read_history, report_lines
from tsdkd.stages.methods import find_method
from tsdkd.stages.models.fingerprint import checkpoint_fingerprint
from tsdkd.stages.models.load import load_model


def record(role: str, letter: str, **changes: str) -> ModelRecord:
    return replace(ModelRecord(role, f"models/{letter}", 64 * letter, "t", "c"), **changes)


STUDENT, OTHER = record("student", "a"), record("student", "b")
TEACHER, SECOND = record("teacher", "c"), record("teacher", "d")
NEAR, STALE = Staleness(0.97, 0.02), Staleness(0.5, 1.5)


def trained(method: str = "tsdkd") -> dict[str, Any]:
    config = TrainConfig(method=method, objective=find_method(method).objective)
    return asdict(config) | {"precision": "float32"}


def checkpoint(path: Path, config: dict[str, Any], *models: ModelRecord) -> ModelRecord:
    """Write the manifest of a checkpoint, as a student."""
    path.mkdir()
    weights = Part("model.safetensors", None, 1, hashlib.sha256(path.name.encode()).hexdigest())
    manifest = Manifest("checkpoint", config, 0, models=models, parts=(weights,), state="complete")
    save_manifest(path, manifest)
    return ModelRecord("student", str(path), checkpoint_fingerprint(path, manifest), "t", "c")


def facts(
    student: ModelRecord,
    samplers: tuple[ModelRecord, ...] = (STUDENT,),
    scorers: tuple[ModelRecord, ...] = (STUDENT, TEACHER),
    policy: str = "student",
    staleness: Staleness | None = None,
) -> dict[str, Fact]:
    rollouts = Manifest("rollouts", {"policy": policy}, 0, models=samplers)
    provenance = Provenance(student, rollouts, Manifest("scores", {}, 0, models=scorers))
    return {fact.name: fact for fact in provenance.facts(staleness)}


@pytest.mark.parametrize(
    ("policy", "samplers", "staleness", "status", "text"),
    [
        ("student", (STUDENT,), None, "ok", "The student that is trained sampled the responses."),
        ("student", (STUDENT, SECOND), None, "ok", "The student that is trained sampled the responses."),
        ("mixed", (STUDENT, TEACHER), None, "ok", "The student that is trained sampled the responses with the teacher"),
        ("student", (OTHER,), None, "look", "Another student, models/b, sampled the responses."),
        ("student", (OTHER,), NEAR, "look", "Another student, models/b, sampled the responses."),
        ("teacher", (TEACHER,), None, "ok", "The teacher models/c sampled the responses, which are off-policy."),
        ("teacher", (OTHER, TEACHER), None, "ok", "The teacher models/c sampled the responses, which are off-policy."),
        ("teacher", (replace(TEACHER, chat_template=SERVED),), None, "unknown", "The scores are from the teacher"),
        ("teacher", (SECOND,), None, "look", "The scores are from the teacher models/c."),
        ("given", (STUDENT,), None, "ok", "The responses are given by the rows of the prompts."),
    ],
)
def test_who_sampled(
    policy: str, samplers: tuple[ModelRecord, ...], staleness: Staleness | None, status: str, text: str
) -> None:
    """What was measured says nothing of a sampler that was not scored."""
    found = facts(STUDENT, samplers, policy=policy, staleness=staleness)["sampler"]
    assert (found.status, bool(found.remedy)) == (status, status != "ok")
    assert text in found.text


@pytest.mark.parametrize(
    ("staleness", "statuses"),
    [(None, ("look", "unknown")), (NEAR, ("ok", "ok")), (STALE, ("look", "look"))],
)
def test_responses_and_scores_of_another_student_are_stale_if_it_is_far(
    staleness: Staleness | None, statuses: tuple[str, str]
) -> None:
    found = facts(OTHER, staleness=staleness)
    assert (found["sampler"].status, found["staleness"].status) == statuses
    if staleness:
        expected = (
            f"overlap {staleness.candidate_overlap:.2f}, drift {staleness.drift:.2f} nats per token (fresh: 1 and 0)."
        )
        assert found["staleness"].text.endswith(expected)


@pytest.mark.parametrize(
    ("policy", "samplers", "sampled_again"),
    [
        ("student", (STUDENT,), True),
        ("mixed", (STUDENT, TEACHER), True),
        ("teacher", (TEACHER,), False),
        ("given", (STUDENT,), False),
    ],
)
def test_only_the_students_own_responses_are_sampled_again(
    policy: str, samplers: tuple[ModelRecord, ...], sampled_again: bool
) -> None:
    found = facts(OTHER, samplers, policy=policy, staleness=STALE)["staleness"]
    assert found.remedy.startswith("Sample and score again" if sampled_again else "Score again")


@pytest.mark.parametrize(
    ("overlap", "drift", "is_stale"),
    [(1.0, 0.0, False), (0.86, 0.14, False), (0.84, 0.0, True), (1.0, 0.16, True), (1.0, -0.16, True)],
)
def test_scores_are_stale_at_little_overlap_and_at_drift_of_either_sign(
    overlap: float, drift: float, is_stale: bool
) -> None:
    assert Staleness(overlap, drift).is_stale == is_stale


def test_scores_of_the_student_that_is_trained_are_fresh() -> None:
    found = facts(STUDENT)
    assert (found["staleness"].status, found["staleness"].text) == (
        "ok",
        "The scores are of the student that is trained: they are fresh.",
    )


def test_the_history_of_a_student_is_followed_to_its_first_model(tmp_path: Path) -> None:
    """Pruned from one teacher, then trained from another, then trained again."""
    pruned = checkpoint(tmp_path / "pruned", asdict(PruneConfig(drop=1)), TEACHER)
    first = checkpoint(tmp_path / "1", trained("gkd"), pruned, SECOND)
    second = checkpoint(tmp_path / "2", trained(), first, SECOND)
    history = read_history(second)
    assert [history.trainings_since(model.weights) for model in (second, first, pruned)] == [None, 1, 2]
    assert history.end == "models/c holds no manifest.json, so it is not an artifact"
    scored = facts(second, samplers=(first,), scorers=(first, TEACHER))
    assert scored["staleness"].text.startswith("The scores are of the student that sampled;")
    rescored = facts(second, samplers=(OTHER,), scorers=(first, TEACHER))
    assert f"The scores are of an earlier student, {first.name} (1 training before);" in rescored["staleness"].text
    assert f"An earlier student, {first.name} (1 training before), sampled" in scored["sampler"].text
    start = scored["start_teacher"]
    assert (start.status, start.text) == (
        "ok",
        "The student's start was pruned from the teacher that scores, models/c (2 trainings before).",
    )
    learned = facts(second, scorers=(second, SECOND))["start_teacher"]
    assert learned.text == "The student's start learned (tsdkd) from the teacher that scores, models/d."
    third = record("teacher", "e")
    other = facts(second, scorers=(second, third))["start_teacher"]
    assert other.status == "look"
    assert (
        other.text
        == "The student's start comes from the teachers models/d and models/c, and the teacher models/e scores."
    )
    several = (second, replace(TEACHER, role="teacher:math"), replace(third, role="teacher:code"))
    assert facts(second, scorers=several)["start_teacher"].status == "look"
    assert facts(second, scorers=(*several[:2], replace(SECOND, role="teacher:code")))["start_teacher"].status == "ok"


def test_a_training_that_changed_nothing_ends_the_history(tmp_path: Path) -> None:
    """The checkpoint has the weights of the student that it was trained from."""
    unchanged = checkpoint(tmp_path / "1", trained(), STUDENT, TEACHER)
    save_manifest(tmp_path / "1", replace(load_manifest(tmp_path / "1"), models=(unchanged, TEACHER)))
    history = read_history(unchanged)
    assert len(history.checkpoints) == 1
    assert history.end == f"{unchanged.name} is its own ancestor"


def test_a_start_without_a_teacher_is_unknown(tmp_path: Path) -> None:
    """A plain model; a checkpoint of given responses; a checkpoint whose weights were replaced since."""
    assert facts(STUDENT)["start_teacher"].text.endswith(
        "unknown: models/a holds no manifest.json, so it is not an artifact."
    )
    given = checkpoint(tmp_path / "given", trained("seqkd"), STUDENT)
    assert facts(given)["start_teacher"].status == "unknown"
    replaced = replace(checkpoint(tmp_path / "replaced", trained(), STUDENT, TEACHER), weights="f" * 64)
    found = facts(replaced)["start_teacher"]
    assert (found.status, bool(found.remedy)) == ("unknown", True)
    assert "has other weights now" in found.text


def test_served_teachers_are_compared_with_served_ones_only(tmp_path: Path) -> None:
    """The last thousandth of a fingerprint's value is rounding."""
    answers = "03e8" * 16
    served = record("teacher", "s", weights=answers, chat_template=SERVED)
    start = checkpoint(tmp_path / "c", trained(), STUDENT, served)

    def status(teacher: ModelRecord) -> tuple[str, str]:
        found = facts(start, scorers=(start, teacher))["start_teacher"]
        return found.status, found.text

    assert status(replace(served, weights="03e9" * 16))[0] == "ok"
    assert status(replace(served, weights="0fff" * 16))[0] == "look"
    assert status(replace(served, name="another"))[0] == "look"
    unknown, text = status(TEACHER)
    assert unknown == "unknown"
    assert "a served teacher cannot be compared with a loaded one" in text


def test_unmet_conditions_come_with_each_remedy_once() -> None:
    found = [
        Fact("a", "ok", "A."),
        Fact("b", "look", "B.", "Do."),
        Fact("c", "unknown", "C.", "Know."),
        Fact("d", "look", "D.", "Do."),
    ]
    assert report_lines(found) == ("A. C.", "B. D. Do.")
    assert report_lines(found[:1]) == ("A.", "")


def test_a_student_is_measured_against_the_scored_one(
    run: Path, student: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scored student itself is at 1 and 0; few tokens are read of evenly spaced rows."""
    source = OfflineSource(run / "rollouts", run / "scores")
    same = source.measure_staleness(load_model(str(student), "float32"))
    assert same.candidate_overlap == 1
    assert same.drift == pytest.approx(0, abs=1e-5)
    other = source.measure_staleness(load_model(str(teacher), "float32"))
    assert other.is_stale
    read = list[int]()
    get: Callable[..., Any] = OfflineSource.__getitem__
    monkeypatch.setattr(OfflineSource, "__getitem__", lambda self, i: read.append(i) or get(self, i))
    monkeypatch.setattr("tsdkd.stages.data.offline.MEASURED_TOKENS", 3 * source.length(0))
    source.measure_staleness(load_model(str(student), "float32"))
    assert len(read) in {2, 3}
    assert (read[0], read[-1]) == (0, len(source) - 1)
