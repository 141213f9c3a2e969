"""lm-eval's scores: gold answers score 1 on every document, and responses that ignore the prompt score by chance."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.benchmark_rows import write_rows
from tests.helpers.tasks import tasks_of
from tsdkd.errors import InputError
from tsdkd.stages.eval import harness, prerequisites
from tsdkd.stages.eval.harness import spread_limit, weighted_mean
from tsdkd.stages.eval.prerequisites import require_prerequisites
from tsdkd.stages.eval.response_tracking import RequestProgress, ResponseLog, TrackedResponse
from tsdkd.stages.eval.sandbox.verdict import check_confinement
from tsdkd.stages.eval.summary import result_line, summarize
from tsdkd.stages.observer import SilentObserver
from tsdkd.stages.results.benchmarks import BENCHMARKS

Respond = Callable[[Any], Any]


class FakeModel:
    """Responds to lm-eval's requests with a function of the request."""

    rank, world_size = 0, 1

    def __init__(self, respond: Respond) -> None:
        self.respond, self.response_log, self.request_progress = respond, ResponseLog(), RequestProgress()

    def start_benchmark(self, *_: object) -> None: ...

    def generate_until(self, requests: list[Any]) -> list[str]:
        return [TrackedResponse.of(request.args[0], self.respond(request)) for request in requests]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(float(self.respond(request)), False) for request in requests]


def score(name: str, respond: Respond, limit: int | None) -> tuple[float, list[dict[str, Any]]]:
    benchmark = BENCHMARKS[name]
    rows = harness.run_benchmark(FakeModel(respond), "fake", benchmark, tasks_of(name), limit, False, SilentObserver())
    rows = [row for row in rows if row["metric"] == benchmark.metric]
    return weighted_mean(rows)[0], rows


GOLD: dict[str, Respond] = {
    "gsm8k": lambda r: r.doc["answer"],
    "gsm-plus:mini": lambda r: r.doc["solution"],
    "math": lambda r: r.doc["answer"],
    "math:minerva": lambda r: r.doc["solution"],
    "mmlu-pro-math": lambda r: f"The answer is ({r.doc['answer']}).",
    "mmlu-stem": lambda r: r.idx == r.doc["answer"],
    "sciq": lambda r: r.idx == 3,
    "mbpp": lambda r: f"{r.doc['code']}\n```",
    "mbpp:base": lambda r: r.doc["code"],
    "bbh": lambda r: f"So the answer is {r.doc['target']}.",
    "bbh:direct": lambda r: r.doc["target"],
    "musr": lambda r: r.arguments[1].strip() == r.doc["answer_choice"],
}
NO_NUMBER = "None"
"""GSM-Plus: the gold answer of 300 of the 2,400 rows of its small set, whose prompts are incomplete. No filter
matches it."""


@pytest.mark.parametrize("name", GOLD)
def test_gold_answers_score_1_on_every_row(name: str, real_data: Path) -> None:
    if BENCHMARKS[name].runs_code and check_confinement():
        pytest.skip("programs cannot be confined here")
    count = {"mbpp": 12, "mbpp:base": 12, "math": 350}.get(name, 54)  # a process for each; shots that look like lists
    _, rows = score(name, GOLD[name], count)
    assert len(rows) == count
    wrong = [row for row in rows if row["score"] < 1]
    if name == "gsm-plus:mini":
        assert wrong
        assert all(row["target"].endswith(NO_NUMBER) for row in wrong)
    else:
        assert not wrong


@pytest.mark.parametrize(("name", "chance"), [("mmlu-stem", 1 / 4), ("sciq", 1 / 4), ("bbh:choice", None)])
def test_responses_that_ignore_the_prompt_score_by_chance(name: str, chance: float | None, real_data: Path) -> None:
    """The response depends on the document's number and the choice alone; four standard errors are allowed."""

    def blind(request: Any) -> int:
        return int.from_bytes(hashlib.sha256(f"{request.doc_id} {request.idx}".encode()).digest()[:6])

    found, rows = score(name, blind, 300)
    expected = chance or sum(1 / len(row["response"].splitlines()) for row in rows) / len(rows)
    assert abs(found - expected) < 4 * (expected * (1 - expected) / len(rows)) ** 0.5


@pytest.mark.parametrize("name", ["gsm8k", "math", "mmlu-pro-math", "mbpp", "bbh", "bbh:direct"])
def test_a_constant_response_scores_0(name: str, real_data: Path) -> None:
    if BENCHMARKS[name].runs_code and check_confinement():
        pytest.skip("programs cannot be confined here")
    assert score(name, lambda _: "pass", 12)[0] == 0


def test_math_verify_accepts_answers_that_string_comparison_rejects(real_data: Path) -> None:
    """A boxed answer in a sentence scores 0 as a string and 1 by math_verify; a bare answer scores 1 by both."""
    responses = {
        "boxed": lambda r: f"So we find that the value is $\\boxed{{{r.doc['answer']}}}$, as required.",
        "bare": lambda r: r.doc["answer"],
    }
    found = {}
    for kind, respond in responses.items():
        rows = harness.run_benchmark(
            FakeModel(respond), "fake", BENCHMARKS["math"], tasks_of("math"), 54, False, SilentObserver()
        )
        found[kind] = {
            key: weighted_mean([r for r in rows if r["metric"] == f"{key},none"])[0]
            for key in ("exact_match", "math_verify")
        }
    assert found["boxed"]["exact_match"] == 0
    assert found["boxed"]["math_verify"] > 0.9
    assert found["bare"] == {"exact_match": 1, "math_verify": pytest.approx(1, abs=0.1)}


def test_instructions_are_scored_by_prompt_and_one_by_one(real_data: Path, punkt: None) -> None:
    """One response to every prompt; the test knows which instructions it follows."""
    name = "ifeval"
    rows = harness.run_benchmark(
        FakeModel(lambda _: "no commas here"), "fake", BENCHMARKS[name], tasks_of(name), None, False, SilentObserver()
    )
    by_metric = {
        key: [row for row in rows if row["metric"] == key]
        for key in (BENCHMARKS[name].metric, *BENCHMARKS[name].other_metrics)
    }
    strict = by_metric["inst_level_strict_acc,none"]
    assert sum(row["weight"] for row in strict) == 834
    prompts = by_metric["prompt_level_strict_acc,none"]
    assert [row["score"] for row in prompts] == [float(row["score"] == 1) for row in strict]
    documents = tasks_of(name)["ifeval"].eval_docs
    for row in strict:
        if documents[row["document"]]["instruction_id_list"] == ["punctuation:no_comma"]:
            assert row["score"] == 1
        if documents[row["document"]]["instruction_id_list"] == ["startend:quotation"]:
            assert row["score"] == 0


def test_the_same_response_gets_the_same_score(real_data: Path, punkt: None) -> None:
    """Without a seed, langdetect detects English in "my name is" three times in four."""
    name = "ifeval"
    rows = harness.run_benchmark(
        FakeModel(lambda _: "my name is"), "fake", BENCHMARKS[name], tasks_of(name), None, False, SilentObserver()
    )
    documents = tasks_of(name)["ifeval"].eval_docs
    scores = [
        row["score"]
        for row in rows
        if documents[row["document"]]["instruction_id_list"] == ["change_case:english_lowercase"]
    ]
    assert len(scores) > 40
    assert len(set(scores)) == 1


def test_means_and_errors_equal_those_of_lm_eval(real_data: Path) -> None:
    """Also over the subjects of a benchmark, weighted by their size."""
    from lm_eval.api.metrics import mean_stderr

    value, rows = score("mmlu-stem", lambda r: r.idx == r.doc_id % 4, 100)
    assert value == pytest.approx(sum(row["score"] for row in rows) / len(rows))
    assert weighted_mean(rows)[1] == pytest.approx(mean_stderr([row["score"] for row in rows]))


def test_the_error_of_a_weighted_mean_is_that_of_a_ratio() -> None:
    """Two of three instructions followed in one document, none of one in the other: 2/4; residuals 2/4 and -1/2."""
    value, stderr = weighted_mean([{"score": 2 / 3, "weight": 3.0}, {"score": 0.0, "weight": 1.0}])
    assert value == pytest.approx(0.5)
    assert stderr == pytest.approx((2 * (0.5**2 + 0.5**2)) ** 0.5 / 4)
    assert weighted_mean([{"score": 1.0, "weight": 2.0}]) == (1.0, None)


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ({"a": 9, "b": 9, "c": 9}, 7, {"a": 2, "b": 2, "c": 3}),
        ({"a": 9, "b": 1, "c": 9}, 7, {"a": 3, "b": 1, "c": 3}),
        ({"a": 2, "b": 1}, 50, {"a": 2, "b": 1}),
        ({"a": 5, "b": 5, "c": 5}, 2, {"b": 1, "c": 1}),
    ],
)
def test_a_limit_is_spread_over_tasks(sizes: dict[str, int], limit: int, expected: dict[str, int]) -> None:
    assert {name: len(documents) for name, documents in spread_limit(sizes, limit).items()} == expected


def test_code_needs_permission() -> None:
    with pytest.raises(InputError, match="runs programs") as caught:
        require_prerequisites([BENCHMARKS["mbpp"]], None, allow_code=False)
    assert "--allow-code-execution" in caught.value.remedy


def test_all_missing_prerequisites_are_reported_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(InputError) as caught:
        require_prerequisites([BENCHMARKS[name] for name in ("sciq", "mbpp", "ifeval")], tmp_path, allow_code=False)
    for name in ("sciq", "mbpp", "ifeval"):
        assert f"{name} needs the directory {tmp_path / name}" in caught.value.cause
    assert "runs programs" in caught.value.cause
    assert "punkt_tab" in caught.value.cause
    assert caught.value.remedy.count("dataset's repository") == 3


def test_code_is_refused_where_it_cannot_be_confined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prerequisites, "check_confinement", lambda: "no libseccomp")
    with pytest.raises(InputError, match="this machine cannot confine them \\(no libseccomp\\)"):
        require_prerequisites([BENCHMARKS["mbpp"]], None, allow_code=True)


def test_limits_of_the_sandbox_are_counted(tmp_path: Path) -> None:
    if check_confinement():
        pytest.skip("programs cannot be confined here")
    programs = (
        "def add(n): return n",
        "import _thread\ndef add(n): _thread.start_new_thread(print, ())",
        "def add(n): return object()",
        "def add(n): return n + 3",
    )
    benchmark = BENCHMARKS["mbpp"]
    tasks = harness.load_tasks(benchmark, write_rows(tmp_path), None)
    model = FakeModel(lambda request: f"{programs[request.doc_id]}\n```")
    rows = harness.run_benchmark(model, "fake", benchmark, tasks, None, False, SilentObserver())
    result = summarize(benchmark, rows)
    assert [row["score"] for row in rows] == [1, 0, 0, 1]
    assert (result["sandbox_limits"], result["judged_by_objects"]) == ({"objects": 1, "threads": 1}, 1)
    line = result_line(benchmark, result)
    assert "programs that failed at a limit of the sandbox: objects 1, threads 1" in line
    assert "programs judged by objects: 1" in line


def test_missing_sentence_data_is_reported_before_the_first_response(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(InputError, match="punkt_tab, which is not installed") as caught:
        require_prerequisites([BENCHMARKS["ifeval"]], None, allow_code=False)
    assert "nltk.downloader" in caught.value.remedy


def test_the_error_for_a_missing_split_names_the_variant_that_has_one(real_data: Path) -> None:
    with pytest.raises(InputError, match="gsm-plus cannot be loaded") as caught:
        harness.load_tasks(BENCHMARKS["gsm-plus"], real_data / "benchmarks", None)
    assert "gsm-plus:mini" in caught.value.remedy
