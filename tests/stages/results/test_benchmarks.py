"""The table: names, variants, and files that lm-eval really has."""

from pathlib import Path

import pytest
import yaml

from tsdkd.errors import InputError
from tsdkd.stages.results.benchmarks import BENCHMARKS, PAPER_BENCHMARKS, choose_benchmarks

SHOTS = dict(zip(PAPER_BENCHMARKS, (5, 5, 4, 5, 5, 0, 0, 3, 0, 0), strict=True))


def names(*asked: str) -> list[str]:
    return [benchmark.name for benchmark in choose_benchmarks(asked)]


def test_all_is_the_papers_ten_with_its_shots() -> None:
    assert names("all") == list(PAPER_BENCHMARKS)
    assert {name: BENCHMARKS[name].shots for name in PAPER_BENCHMARKS} == SHOTS
    assert " ".join(PAPER_BENCHMARKS) == "gsm8k gsm-plus math mmlu-pro-math mmlu-stem sciq mbpp bbh musr ifeval"


def test_names_are_forgiving_and_come_once_in_the_tables_order() -> None:
    assert names("SciQ", " gsm_plus", "sciq", "gsm-plus") == ["gsm-plus", "sciq"]


def test_a_variant_takes_the_place_of_its_benchmark_in_all() -> None:
    found = names("all", "gsm-plus:mini")
    assert "gsm-plus" not in found
    assert len(found) == 10
    assert names("math", "math:minerva") == ["math", "math:minerva"]


def test_an_unknown_name_is_answered_with_the_list() -> None:
    with pytest.raises(InputError, match="no benchmark 'poetry'") as caught:
        choose_benchmarks(["gsm8k", "poetry"])
    assert all(name in caught.value.remedy for name in BENCHMARKS)


TASKS = {"math": 7, "math:minerva": 7, "mmlu-stem": 19, "bbh": 27, "bbh:direct": 27, "bbh:choice": 24, "musr": 3}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_overlays_include_stock_files_and_read_a_local_copy_when_told(name: str) -> None:
    benchmark = BENCHMARKS[name]
    stock, local = benchmark.overlays(), benchmark.overlays(Path("/copy"), Path("/cache"))
    assert len(stock) == len(local) == TASKS.get(name, 1)
    for overlay in stock.values():
        content = yaml.load(overlay, Loader)
        assert content["num_fewshot"] == benchmark.shots
        assert "include" not in content or Path(content["include"]).is_file()
    for overlay in local.values():
        content = yaml.load(overlay, Loader)
        assert content["dataset_path"] == "/copy"
        assert content["dataset_kwargs"] == {"cache_dir": "/cache"}


def test_the_rows_that_come_along_are_in_no_folder() -> None:
    assert BENCHMARKS["embedded"].rows(Path("/data")) is None
    assert BENCHMARKS["gsm-plus:mini"].rows(Path("/data")) == Path("/data/gsm_plus")
    assert BENCHMARKS["gsm8k"].rows(None) is None


class Loader(yaml.SafeLoader):
    """YAML with lm-eval's functions by name."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
