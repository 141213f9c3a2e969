"""Measures of sampled responses, the findings about them, and the risk of the entropy term."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tsdkd.core import Head, TSDKDConfig, entropy, generalized_jsd, opener_mask
from tsdkd.stages.config.doctor import DoctorConfig
from tsdkd.stages.data.requests import Response
from tsdkd.stages.doctor import entropy_term
from tsdkd.stages.doctor.entropy_term import check_entropy_term
from tsdkd.stages.doctor.findings import Finding
from tsdkd.stages.doctor.response_findings import Sampled, response_findings
from tsdkd.stages.doctor.responses import Responses, _measure, compare_chunk

TABLES = Path(__file__).parents[3] / "docs" / "study" / "tables.md"
HEALTHY = {
    "student_entropy": 2.0,
    "teacher_entropy": 1.5,
    "student_log_prob": -2.0,
    "teacher_log_prob": -2.5,
    "student_outside_mass": 0.2,
    "teacher_outside_mass": 0.2,
    "topk_agreement": 0.8,
    "top1_in_candidates": 0.95,
    "top1_agreement": 0.7,
    "kl": 0.1,
    "gate": 0.6,
    "opener_length": 4.0,
}


def responses(limit: int = 16, **values: float) -> Responses:
    """Four responses, whose log-probabilities differ a little."""
    fractions = {name: values.pop(name, 0.0) for name in ("truncated", "repeating", "thinking")}
    noise = torch.tensor([-0.1, 0.0, 0.0, 0.1], dtype=torch.float64)
    columns = {name: value + noise * name.endswith("log_prob") for name, value in (HEALTHY | values).items()}
    return Responses(columns, [8] * 4, limit=limit, **fractions)


def sampled(student: dict[str, Any] | None = None, teacher: dict[str, Any] | None = None) -> Sampled:
    """Responses of a healthy pair: both models together find the teacher's more likely."""
    better = {"student_log_prob": -2.0, "teacher_log_prob": -1.0}
    return Sampled(responses(**(student or {})), responses(**(better | (teacher or {}))))


def find(both: Sampled, name: str, sizes: tuple[int, int] = (1, 2), max_new_tokens: int = 16) -> Finding:
    pair: Any = [SimpleNamespace(parameters=size) for size in sizes]
    return next(f for f in response_findings(both, pair, TSDKDConfig(), max_new_tokens) if f.name == name)


def test_chunks_are_compared_by_the_definitions() -> None:
    torch.manual_seed(0)
    heads = Head(torch.randn(20, 6)), Head(torch.randn(20, 8))
    student, teacher, ids = torch.randn(5, 6), torch.randn(5, 8), torch.tensor([0, 3, 7, 11, 19])
    found = compare_chunk(student, teacher, ids, heads, k=3)
    q, p = (head.logits(hidden) for head, hidden in zip(heads, (student, teacher), strict=True))
    rows = range(5)
    own, best = q.topk(3).indices, p.topk(3).indices
    shared = [len({*own[i].tolist()} & {*best[i].tolist()}) / 3 for i in rows]
    expected = {
        "student_entropy": entropy(q),
        "teacher_entropy": entropy(p),
        "student_log_prob": q.log_softmax(-1)[rows, ids],
        "teacher_log_prob": p.log_softmax(-1)[rows, ids],
        "student_outside_mass": torch.stack([1 - q.softmax(-1)[i, own[i]].sum() for i in rows]),
        "teacher_outside_mass": torch.stack([1 - p.softmax(-1)[i, own[i]].sum() for i in rows]),
        "topk_agreement": torch.tensor(shared),
        "top1_in_candidates": torch.tensor([float(p[i].argmax() in own[i]) for i in rows]),
        "top1_agreement": (q.argmax(-1) == p.argmax(-1)).float(),
        "kl": generalized_jsd(q, p, 0),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_responses_are_measured_one_by_one() -> None:
    """Gate and opener are those that training would select; padding does not count."""
    rows: list[Any] = [
        {"sample_id": i, "student_entropy": torch.tensor(own), "teacher_entropy": torch.zeros(len(own))}
        for i, own in enumerate(([1.0, 1.0, 8.0], [5.0]))
    ]
    model: Any = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: "<think>" * (ids[0] == 7)))
    written = [Response([7, 2, 9], "stop"), Response([3], "length")]
    found = _measure(rows, written, model, 16, TSDKDConfig(opener=0.2))
    opener = opener_mask(torch.tensor([[1.0, 1.0, 8.0]]), torch.ones(1, 3, dtype=torch.bool), 0.2)
    assert found.columns["opener_length"].tolist() == [int(opener.sum()), 1] == [2, 1]
    gate = torch.sigmoid(torch.tensor([1.0, 1.0, 8.0])).mean()
    torch.testing.assert_close(found.columns["gate"][0].float(), gate)
    assert found.mean("student_entropy") == pytest.approx((10 / 3 + 5) / 2)
    assert (found.truncated, found.thinking, found.repeating, found.lengths) == (0.5, 0.5, 0.0, [3, 1])
    adaptive = _measure(rows, written, model, 16, TSDKDConfig(opener="adaptive"))
    assert adaptive.columns["opener_length"].tolist() == [2, 1]


def test_a_healthy_pair_has_no_finding_to_look_at() -> None:
    pair: Any = [SimpleNamespace(parameters=size) for size in (1, 2)]
    assert {f.name: f.status for f in response_findings(sampled(), pair, TSDKDConfig(), 16) if f.status != "ok"} == {}


@pytest.mark.parametrize(
    ("name", "student", "words"),
    [
        (
            "response_length",
            {"truncated": 0.25},
            "25% of the student's and 0% of the teacher's responses",
        ),
        ("repetition", {"repeating": 0.5}, "50% of the student's"),
        ("thoughts", {"thinking": 0.25}, "25% of the student's"),
        ("entropy", {"student_entropy": 1.0}, "entropy is below the teacher's"),
        ("gate", {"gate": 0.4}, "counts less than half"),
        ("opener", {"opener_length": 1.0}, "hardly more than the first token"),
        ("topk_agreement", {"topk_agreement": 0.3}, "0.3 on the student's responses"),
        ("outside_mass", {"teacher_outside_mass": 0.8}, "teacher's probability 0.8 on the student's"),
        ("top1_in_candidates", {"top1_in_candidates": 0.8}, "the indirect term cannot teach it."),
    ],
)
def test_each_measure_beyond_its_threshold_needs_a_look(name: str, student: dict[str, float], words: str) -> None:
    found = find(sampled(student), name)
    assert (found.status, bool(found.remedy)) == ("look", True)
    assert words in found.reason


@pytest.mark.parametrize(
    ("name", "at", "above"),
    [
        ("response_length", {"truncated": 0.1}, {"truncated": 0.11}),
        ("repetition", {"repeating": 0.1}, {"repeating": 0.11}),
        ("thoughts", {"thinking": 0.0}, {"thinking": 0.01}),
        ("outside_mass", {"student_outside_mass": 0.5}, {"student_outside_mass": 0.51}),
        ("outside_mass", {"teacher_outside_mass": 0.5}, {"teacher_outside_mass": 0.51}),
    ],
)
def test_thresholds_hold_for_the_responses_of_either_model(
    name: str, at: dict[str, float], above: dict[str, float]
) -> None:
    assert find(sampled(at, at), name).status == "ok"
    assert find(sampled(above), name).status == find(sampled(teacher=above), name).status == "look"


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_short_sample_cannot_count_truncated_responses(role: str) -> None:
    found = find(sampled(**{role: {"truncated": 0.25}}), "response_length", max_new_tokens=512)
    assert "How many exceed --max-new-tokens 512 is unknown." in found.reason
    assert found.remedy == "Measure it: --sample-tokens 512."


def test_whether_the_teacher_knows_more() -> None:
    """The sum of both models' log-probabilities, paired by prompt; a better student stops a swapped pair."""
    assert find(sampled(), "knowledge").values["difference"] == pytest.approx(1.5)
    worse = sampled(teacher={"student_log_prob": -5.0, "teacher_log_prob": -4.0})
    assert find(worse, "knowledge").status == "look"
    assert "know more than the teacher" in find(worse, "knowledge").reason
    swapped = find(worse, "knowledge", sizes=(2, 1))
    assert (swapped.status, swapped.remedy) == ("stop", "Swap --student and --teacher.")
    assert find(worse, "knowledge", sizes=(2, 2)).status == "stop"
    one = Sampled(
        *(Responses({n: c[:1] for n, c in r.columns.items()}, [8], 0, 0, 0, 16) for r in vars(worse).values())
    )
    assert (find(one, "knowledge").status, find(one, "knowledge").values["standard_error"]) == ("look", None)
    assert "within 2 standard errors" in find(one, "knowledge").reason  # the error of one response is unknown
    same = Sampled(responses(), responses())
    assert "within 2 standard errors: the teacher does not seem to know more" in find(same, "knowledge").reason


def entropy_finding(rate: float, kl: float = 0.1, entropy: float = 0.2, **objective: float) -> Finding:
    config = DoctorConfig(learning_rate=rate, objective=replace(TSDKDConfig(), **objective))
    return check_entropy_term(sampled(teacher={"kl": kl, "student_entropy": entropy}), config)


@pytest.mark.parametrize(
    ("rate", "objective", "harm", "status"),
    [
        (1e-4, {}, "likely", "look"),
        (2.5e-5, {"em_weight": 0.01}, "likely", "look"),
        (1e-4, {"direct_weight": 0.0}, "likely", "look"),
        (5e-6, {}, "unknown", "look"),
        (1e-4, {"em_weight": 0.01, "direct_weight": 10.0}, "not shown", "ok"),
        (1e-4, {"em_weight": 0.0}, "none", "ok"),
    ],
)
def test_the_harm_of_the_entropy_term(rate: float, objective: dict[str, float], harm: str, status: str) -> None:
    found = entropy_finding(rate, **objective)
    assert (found.values["harm"], found.status) == (harm, status)
    assert (harm == "none") or "docs/study/tables.md" in found.reason
    assert " entropy " in found.reason.partition("(")[0]  # the conclusion comes before its numbers


def test_the_finding_compares_the_pair_with_the_studys() -> None:
    assert "like the study's students" in entropy_finding(1e-4).reason
    for other in ({"kl": 0.4}, {"entropy": 2.5}):
        found = entropy_finding(1e-4, **other)
        assert "outside the study's 0.0555 to 0.1552 and 0.171 to 0.28." in found.reason
        assert (found.values["harm"], found.status) == ("unknown", "look")


def test_every_number_of_the_finding_is_in_the_tables_of_the_study() -> None:
    tables = TABLES.read_text()
    texts = [value for name, value in vars(entropy_term).items() if name.isupper() and isinstance(value, str)]
    numbers = [number for text in texts for number in re.findall(r"[+-]?\d+\.\d+(?: ± \d+\.\d+)?", text)]
    numbers += map(str, (*entropy_term.SUMS_KL, *entropy_term.SUMS_ENTROPY))
    assert len(numbers) > 20
    assert [number for number in numbers if number not in tables] == []
