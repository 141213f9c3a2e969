"""The benchmarks: names, variants and local datasets."""

from pathlib import Path

import pytest

from tsdkd.errors import InputError
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.results.benchmark import Sampling
from tsdkd.stages.results.benchmarks import BENCHMARKS, PAPER_BENCHMARKS, choose_benchmarks

SHOTS = dict(zip(PAPER_BENCHMARKS, (5, 5, 4, 5, 5, 0, 0, 3, 0, 0), strict=True))


def chosen_names(*names: str) -> list[str]:
    return [benchmark.name for benchmark in choose_benchmarks(names)]


def test_all_is_the_papers_ten_with_its_shots() -> None:
    assert chosen_names("all") == list(PAPER_BENCHMARKS)
    assert {name: BENCHMARKS[name].shots for name in PAPER_BENCHMARKS} == SHOTS
    assert " ".join(PAPER_BENCHMARKS) == "gsm8k gsm-plus math mmlu-pro-math mmlu-stem sciq mbpp bbh musr ifeval"


def test_reasoning_is_a_suite_beside_the_ten() -> None:
    suite = ["aime24", "aime25", "amc23", "math-500", "gpqa-diamond"]
    assert chosen_names("reasoning") == suite
    assert chosen_names("reasoning", "all", "MATH_500") == [*PAPER_BENCHMARKS, *suite]


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("gsm8k", {}, (0, 1, 1)),
        ("gsm8k", {"temperature": 0.8, "samples": 4}, (0.8, 1, 4)),
        ("aime24", {}, (0.6, 0.95, 16)),
        ("aime24", {"temperature": 1.0, "samples": 64}, (1, 0.95, 64)),
        ("aime24", {"temperature": 0.0}, (0, 1, 1)),
    ],
)
def test_options_replace_the_sampling_of_a_benchmark(name: str, given: dict[str, float], expected: tuple) -> None:
    assert BENCHMARKS[name].choose_sampling(EvalConfig(**given)) == Sampling(*expected)


def test_names_are_normalized_and_ordered_without_repetition() -> None:
    assert chosen_names("SciQ", " gsm_plus", "sciq", "gsm-plus") == ["gsm-plus", "sciq"]


def test_a_variant_replaces_its_benchmark_in_all() -> None:
    found = chosen_names("all", "gsm-plus:mini")
    assert "gsm-plus" not in found
    assert len(found) == 10
    assert chosen_names("math", "math:minerva") == ["math", "math:minerva"]


def test_an_unknown_name_is_refused_with_the_list() -> None:
    with pytest.raises(InputError, match="'poetry' is not a benchmark") as caught:
        choose_benchmarks(["gsm8k", "poetry"])
    assert all(name in caught.value.remedy for name in BENCHMARKS)


def test_included_data_needs_no_local_dataset() -> None:
    assert BENCHMARKS["embedded"].local_dataset(Path("/data")) is None
    assert BENCHMARKS["gsm-plus:mini"].local_dataset(Path("/data")) == Path("/data/gsm_plus")
    assert BENCHMARKS["gsm8k"].local_dataset(None) is None
