"""Findings from sampled responses. Values are means over responses of means over their tokens."""

from dataclasses import dataclass
from math import sqrt

from tsdkd.core import TSDKDConfig
from tsdkd.stages.doctor.findings import Finding, finding
from tsdkd.stages.doctor.model_files import Pair
from tsdkd.stages.doctor.responses import Responses

TRUNCATED_ABOVE = REPEATING_ABOVE = 0.1
"""Fractions of responses."""
HALF = 0.5
"""Of a distribution, of the candidates, and of the weight of the divergence."""
TOP1_BELOW = 0.9
"""Fraction of tokens; below it, the ranking cannot teach the teacher's choice at one token in ten."""
STANDARD_ERRORS = 2
"""A smaller difference is within noise."""


@dataclass(frozen=True)
class Sampled:
    """The responses of both models to the same prompts."""

    student: Responses
    teacher: Responses

    def both(self, name: str) -> str:
        """A value on the student's and on the teacher's responses, in words."""
        return (
            f"{self.student.mean(name):.3g} on the student's responses, {self.teacher.mean(name):.3g} on the teacher's"
        )

    def values(self, *names: str) -> dict[str, dict[str, float]]:
        """Values by name and author of the responses."""
        authors = {"student": self.student, "teacher": self.teacher}
        return {name: {author: responses.mean(name) for author, responses in authors.items()} for name in names}


def response_findings(sampled: Sampled, pair: Pair, objective: TSDKDConfig, max_new_tokens: int) -> list[Finding]:
    return [
        _lengths(sampled, max_new_tokens),
        _repetition(sampled),
        _thoughts(sampled),
        _entropies(sampled),
        _gate(sampled),
        _opener(sampled),
        _topk_agreement(sampled, objective.k),
        _outside_mass(sampled, objective.k),
        _top1_in_candidates(sampled, objective.k),
        _knowledge(sampled, pair),
    ]


def _lengths(sampled: Sampled, max_new_tokens: int) -> Finding:
    student, teacher, limit = sampled.student, sampled.teacher, sampled.student.limit
    lengths = {author: sum(r.lengths) / len(r.lengths) for author, r in (("student", student), ("teacher", teacher))}
    reason = (
        f"At {limit} tokens, {student.truncated:.0%} of the student's and {teacher.truncated:.0%} of the teacher's "
        f"responses are truncated; means are {lengths['student']:.0f} and {lengths['teacher']:.0f} tokens."
    )
    problem = remedy = ""
    if max(student.truncated, teacher.truncated) > TRUNCATED_ABOVE and limit < max_new_tokens:
        problem = f"How many exceed --max-new-tokens {max_new_tokens} is unknown."
        remedy = f"Measure it: --sample-tokens {max_new_tokens}."
    elif max(student.truncated, teacher.truncated) > TRUNCATED_ABOVE:
        problem, remedy = (
            "A truncated response teaches no end token.",
            "Raise --max-new-tokens, or correct the end tokens.",
        )
    values = {
        "truncated": {"student": student.truncated, "teacher": teacher.truncated},
        "response_length": lengths,
        "limit": limit,
    }
    return finding("response_length", reason, problem, remedy, values=values)


def _repetition(sampled: Sampled) -> Finding:
    fractions = {"student": sampled.student.repeating, "teacher": sampled.teacher.repeating}
    reason = f"{_percent(fractions)} repeat themselves."
    problem = "Training on them teaches repetition." if max(fractions.values()) > REPEATING_ABOVE else ""
    return finding(
        "repetition", reason, problem, "Sample nearer --temperature 1, or choose a better model.", values=fractions
    )


def _thoughts(sampled: Sampled) -> Finding:
    fractions = {"student": sampled.student.thinking, "teacher": sampled.teacher.thinking}
    reason = f"{_percent(fractions)} begin with a thought."
    problem = "Thoughts take a part of --max-new-tokens, and are distilled." if max(fractions.values()) else ""
    remedy = "Give a --max-new-tokens that holds thought and answer, or a chat template that switches thinking off."
    return finding("thoughts", reason, problem, remedy, values=fractions)


def _entropies(sampled: Sampled) -> Finding:
    names = "student_entropy", "teacher_entropy"
    reason = f"Nats per token: the student's is {sampled.both(names[0])}; the teacher's is {sampled.both(names[1])}."
    lower = sampled.student.mean(names[0]) < sampled.student.mean(names[1])
    problem = "On its own responses, the student's entropy is below the teacher's." if lower else ""
    return finding("entropy", reason, problem, "Check that the models are not swapped.", values=sampled.values(*names))


def _gate(sampled: Sampled) -> Finding:
    reason = f"The mean is {sampled.both('gate')}."
    problem = (
        "The teacher's entropy is above the student's, so the divergence counts less than half."
        if sampled.student.mean("gate") < HALF
        else ""
    )
    return finding(
        "gate",
        reason,
        problem,
        "Check that the models are not swapped, or train with --no-gate.",
        values=sampled.values("gate"),
    )


def _opener(sampled: Sampled) -> Finding:
    reason = f"Tokens: {sampled.both('opener_length')}."
    problem = (
        "The indirect term learns from hardly more than the first token of a response."
        if sampled.student.mean("opener_length") < 2
        else ""
    )
    return finding("opener", reason, problem, "Raise --opener.", values=sampled.values("opener_length"))


def _topk_agreement(sampled: Sampled, k: int) -> Finding:
    reason = (
        f"Fraction of the student's {k} candidates among the teacher's {k} most likely tokens: "
        f"{sampled.both('topk_agreement')}."
    )
    problem = "Most candidates are unlikely for the teacher." if sampled.student.mean("topk_agreement") < HALF else ""
    return finding(
        "topk_agreement",
        reason,
        problem,
        "Train with forward KL on the teacher's responses first (--method supervised-kd).",
        values=sampled.values("topk_agreement", "top1_agreement"),
    )


def _outside_mass(sampled: Sampled, k: int) -> Finding:
    names = "student_outside_mass", "teacher_outside_mass"
    reason = (
        f"Outside the student's {k} candidates is the student's probability {sampled.both(names[0])}; the teacher's "
        f"probability {sampled.both(names[1])}."
    )
    problem = (
        "The ranking orders tokens that hold less than half of a distribution."
        if max(r.mean(n) for r in (sampled.student, sampled.teacher) for n in names) > HALF
        else ""
    )
    return finding("outside_mass", reason, problem, "Raise --k, or lower --alpha.", values=sampled.values(*names))


def _top1_in_candidates(sampled: Sampled, k: int) -> Finding:
    name = "top1_in_candidates"
    reason = (
        f"Fraction of tokens where the teacher's most likely token is among the {k} candidates: {sampled.both(name)}."
    )
    problem = (
        "At the other tokens the indirect term cannot teach it." if sampled.student.mean(name) < TOP1_BELOW else ""
    )
    return finding(name, reason, problem, "Raise --k.", values=sampled.values(name))


def _percent(fractions: dict[str, float]) -> str:
    return f"{fractions['student']:.0%} of the student's and {fractions['teacher']:.0%} of the teacher's responses"


def _knowledge(sampled: Sampled, pair: Pair) -> Finding:
    """Which model's responses both models together find more likely, paired by prompt.

    Each model finds its own responses more likely, so the sum over both models compares the responses. It measures
    confidence, not correctness.
    """
    names = "student_log_prob", "teacher_log_prob"
    teacher, student = (r.columns[names[0]] + r.columns[names[1]] for r in (sampled.teacher, sampled.student))
    differences = teacher - student
    difference, count = float(differences.mean()), len(differences)
    error = float(differences.std()) / sqrt(count) if count > 1 else float("inf")
    reason = (
        f"Mean log-probability of a token: the student gives {sampled.both(names[0])}; the teacher gives "
        f"{sampled.both(names[1])}. The sum of both is {difference:+.2f} ± {error:.2f} on the teacher's responses, "
        "relative to the student's."
    )
    values = sampled.values(*names) | {"difference": difference, "standard_error": error if count > 1 else None}
    if difference > STANDARD_ERRORS * error:
        return finding("knowledge", reason, values=values)
    if difference >= -STANDARD_ERRORS * error:
        problem = (
            f"This is within {STANDARD_ERRORS} standard errors: the teacher does not seem to know more than the "
            "student on these prompts."
        )
        return finding(
            "knowledge",
            reason,
            problem,
            "Compare both on a benchmark (tsdkd eval), or sample more prompts.",
            values=values,
        )
    swapped = pair[1].parameters <= pair[0].parameters
    problem = f"The student seems to know more than the teacher{', which is not larger' * swapped}."
    remedy = (
        "Swap --student and --teacher." if swapped else "Compare both on a benchmark (tsdkd eval) before you train."
    )
    return finding("knowledge", reason, problem, remedy, "stop" if swapped else "look", values=values)
