"""The provenance of recorded responses and scores, from manifests alone; no weight is read.

Offline training rests on two conditions: the student that is trained sampled the responses, and its start learned from
the teacher that scores (teacher consistency, arXiv 2604.13010). Facts describe how far a run meets them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from tsdkd.artifacts.manifest import Manifest, ModelRecord, load_manifest
from tsdkd.errors import TsdkdError
from tsdkd.stages.config.generate import AUTHORS, GIVEN
from tsdkd.stages.models.fingerprint import checkpoint_fingerprint

STALE_OVERLAP, STALE_DRIFT = 0.85, 0.15
"""Scores are stale below this candidate overlap, or beyond this drift in nats per token; see docs/results.md."""
SAMPLE_AGAIN = "Sample and score again with the student that is trained (docs/rounds.md)."
SCORE_AGAIN = "Score again with the student that is trained."
"""The remedy where no student sampled the responses."""


def has_student_responses(rollouts: Manifest) -> bool:
    """Whether the student takes part in the responses, so that they become stale with it."""
    return not {*AUTHORS[rollouts.config["policy"]]} <= {"teacher", GIVEN}


@dataclass(frozen=True, slots=True)
class Staleness:
    """How far a student is from the one that was scored; see `ScoringSnapshot.compare`."""

    candidate_overlap: float
    drift: float
    """Nats per token."""

    @property
    def is_stale(self) -> bool:
        return self.candidate_overlap < STALE_OVERLAP or abs(self.drift) > STALE_DRIFT

    def __str__(self) -> str:
        return f"candidate overlap {self.candidate_overlap:.2f}, drift {self.drift:.2f} nats per token"


@dataclass(frozen=True, slots=True)
class Fact:
    """One sentence or two about the origin of responses and scores."""

    name: str
    status: Literal["ok", "unknown", "look"]
    """look: a condition is not met."""
    text: str
    remedy: str = ""
    """Empty if ok."""


@dataclass(frozen=True)
class History:
    """The checkpoints that a model was made by, newest first, as far as their manifests exist."""

    checkpoints: tuple[Manifest, ...]
    end: str
    """Why the past of the first model is unknown."""

    def trainings_since(self, weights: str) -> int | None:
        """The number of checkpoints since a student had these weights; None for another model."""
        students = [_trained_model(checkpoint).weights for checkpoint in self.checkpoints]
        return 1 + students.index(weights) if weights in students else None


def read_history(model: ModelRecord) -> History:
    """Follows the manifests of checkpoints from a model to the first model; a changed checkpoint ends the history."""
    checkpoints: list[Manifest] = []
    seen = set[str]()
    while model.weights not in seen:
        seen.add(model.weights)
        directory = Path(model.name).expanduser()
        try:
            manifest = load_manifest(directory)
            found = checkpoint_fingerprint(directory, manifest) if manifest.kind == "checkpoint" else ""
        except TsdkdError as error:
            return History(tuple(checkpoints), error.cause.rstrip("."))
        except OSError as error:  # a directory of another user
            return History(tuple(checkpoints), f"{model.name} cannot be read ({error.strerror})")
        if found != model.weights:
            return History(tuple(checkpoints), f"{model.name} has other weights now")
        checkpoints.append(manifest)
        model = _trained_model(manifest)
    return History(tuple(checkpoints), f"{model.name} is its own ancestor")


@dataclass(frozen=True)
class Provenance:
    """The models behind a student's rollouts and scores."""

    student: ModelRecord
    """The student that is trained."""
    rollouts: Manifest
    scores: Manifest

    @cached_property
    def history(self) -> History:
        return read_history(self.student)

    @property
    def scored(self) -> ModelRecord:
        """The student whose candidates the scores hold."""
        return self.scores.model("student")

    @property
    def samplers(self) -> list[ModelRecord]:
        """The models that sampled the responses; none for given responses."""
        policy, teachers = self.rollouts.config["policy"], list(self.rollouts.teachers.values())
        students = [model for model in self.rollouts.models if model.role == "student"]
        return {GIVEN: [], "student": students, "teacher": teachers}.get(policy, students + teachers)

    @property
    def has_same_weights(self) -> bool:
        """Whether the scores are of the student that is trained."""
        return self.student.weights == self.scored.weights

    def facts(self, staleness: Staleness | None) -> list[Fact]:
        """`staleness`: of the scores, as measured; None if their weights are the same, or if nothing was measured."""
        return [self._sampler(staleness), self._scored(staleness), self._start_teacher()]

    def _sampler(self, staleness: Staleness | None) -> Fact:
        students = [model for model in self.samplers if model.role == "student"]
        teachers = [model for model in self.samplers if model.role != "student"]
        if not self.samplers:
            return Fact("sampler", "ok", "The responses are given by the rows of the prompts.")
        if not students:
            return self._teacher_sampler(teachers)
        (sampler,) = students
        together = f" with {_names(teachers)}" if teachers else ""
        text = _capitalised(f"{self._describe(sampler)} sampled the responses{together}.")
        if sampler.weights == self.student.weights:
            return Fact("sampler", "ok", text)
        is_near = sampler.weights == self.scored.weights and staleness is not None and not staleness.is_stale
        return Fact("sampler", "ok", text) if is_near else Fact("sampler", "look", text, SAMPLE_AGAIN)

    def _teacher_sampler(self, samplers: list[ModelRecord]) -> Fact:
        scorers = list(self.scores.teachers.values())
        text = _capitalised(f"{_names(samplers)} sampled the responses, which are off-policy.")
        found = [_is_among(sampler, scorers) for sampler in samplers]
        if all(found):
            return Fact("sampler", "ok", text)
        text = f"{text} The scores are from {_names(scorers)}."
        if False in found:
            remedy = "Sample with the teacher that scores, or score with the one that sampled."
            return Fact("sampler", "look", text, remedy)
        return Fact("sampler", "unknown", text, "Make sure that the server serves the teacher that sampled.")

    def _scored(self, staleness: Staleness | None) -> Fact:
        name = "staleness"
        if self.has_same_weights:
            return Fact(name, "ok", "The scores are of the student that is trained: they are fresh.")
        has_sampled = self.scored.weights in {model.weights for model in self.samplers}
        scored = "the student that sampled" if has_sampled else self._describe(self.scored).rstrip(",")
        text = f"The scores are of {scored}"
        remedy = SAMPLE_AGAIN if has_student_responses(self.rollouts) else SCORE_AGAIN
        if staleness is None:
            return Fact(name, "unknown", f"{text}; how stale they are was not measured.", remedy)
        text = f"{text}. The student that is trained has {staleness} (fresh: 1 and 0)."
        return Fact(name, "look", text, remedy) if staleness.is_stale else Fact(name, "ok", text)

    def _start_teacher(self) -> Fact:
        """The teacher that scores, compared with the teachers that the student's start learned from."""
        name, scorers = "start_teacher", list(self.scores.teachers.values())
        known = [model for checkpoint in self.history.checkpoints for model in checkpoint.teachers.values()]
        found = [_is_among(scorer, known) for scorer in scorers]
        if all(found):
            return Fact(name, "ok", " ".join(map(self._describe_start, scorers)))
        if False in found and known:
            missing = [scorer for scorer, is_known in zip(scorers, found, strict=True) if is_known is False]
            text = f"The student's start comes from {_names(known)}, and {_names(missing)} scores."
            remedy = "Score with the teacher of the start, or train the start on responses of the one that scores."
            return Fact(name, "look", text, remedy)
        reason = self.history.end if False in found else "a served teacher cannot be compared with a loaded one"
        text = f"Which teacher the student's start learned from is unknown: {reason}."
        remedy = f"Make sure that the start learned from responses of {_names(scorers)}."
        return Fact(name, "unknown", text, remedy)

    def _describe_start(self, scorer: ModelRecord) -> str:
        """The newest checkpoint that has learned from a teacher, in words."""
        checkpoints = self.history.checkpoints
        age = next(i for i, c in enumerate(checkpoints) if _is_among(scorer, c.teachers.values()))
        if "drop" in checkpoints[age].config:
            how = "was pruned from"
        else:
            how = f"learned ({checkpoints[age].config['method']}) from"
        return f"The student's start {how} the teacher that scores, {scorer.name}{_trainings_before(age)}."

    def _describe(self, model: ModelRecord) -> str:
        """A student, as an earlier or another one than the one that is trained."""
        if model.weights == self.student.weights:
            return "the student that is trained"
        if count := self.history.trainings_since(model.weights):
            return f"an earlier student, {model.name}{_trainings_before(count)},"
        return f"another student, {model.name},"


def report_lines(facts: Sequence[Fact]) -> tuple[str, str]:
    """The facts that are ok or unknown, and those that are not with their remedies, as text; each may be empty."""
    met, unmet = ([fact for fact in facts if (fact.status == "look") == is_unmet] for is_unmet in (False, True))
    remedies = dict.fromkeys(fact.remedy for fact in unmet)
    return " ".join(fact.text for fact in met), " ".join([*(fact.text for fact in unmet), *remedies])


def _trained_model(checkpoint: Manifest) -> ModelRecord:
    """The model that training or pruning started from."""
    return checkpoint.model("teacher" if "drop" in checkpoint.config else "student")


def _is_among(teacher: ModelRecord, others: Iterable[ModelRecord]) -> bool | None:
    """Whether a teacher is one of others; None if only fingerprints that cannot be compared stand against it."""
    found = [_is_same(teacher, other) for other in others]
    return True if True in found else None if None in found else False


def _is_same(one: ModelRecord, other: ModelRecord) -> bool | None:
    """None for a served and a loaded teacher: the one is known by its answers, the other by its files."""
    if one.served != other.served:
        return None
    if not one.served:
        return one.weights == other.weights
    from tsdkd.stages.teacher_server.fingerprint import same_teacher  # loads torch, which a report does not need

    return one.name == other.name and same_teacher(one.weights, other.weights)


def _names(teachers: Sequence[ModelRecord]) -> str:
    names = list(dict.fromkeys(teacher.name for teacher in teachers))
    return f"the teacher{'s' * (len(names) > 1)} {' and '.join(names)}"


def _capitalised(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _trainings_before(count: int) -> str:
    return f" ({count} training{'s' * (count > 1)} before)" if count else ""
