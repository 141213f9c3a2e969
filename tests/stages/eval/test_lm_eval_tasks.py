"""Task files for lm-eval: they include files that exist, and read a local dataset on request."""

from pathlib import Path

import pytest
import yaml

from tsdkd.stages.eval.lm_eval_tasks import task_overlays
from tsdkd.stages.results.benchmarks import BENCHMARKS

TASKS = {"math": 7, "math:minerva": 7, "mmlu-stem": 19, "bbh": 27, "bbh:direct": 27, "bbh:choice": 24, "musr": 3}
"""Numbers of lm-eval tasks; other benchmarks have one."""


@pytest.mark.parametrize("name", BENCHMARKS)
def test_overlays_include_stock_files_and_read_a_local_dataset(name: str) -> None:
    benchmark = BENCHMARKS[name]
    from_hub, local = task_overlays(benchmark), task_overlays(benchmark, Path("/copy"), Path("/cache"))
    assert len(from_hub) == len(local) == TASKS.get(name, 1)
    for overlay in from_hub.values():
        content = yaml.load(overlay, Loader)
        assert content["num_fewshot"] == benchmark.shots
        assert "include" not in content or Path(content["include"]).is_file()
    for overlay in local.values():
        content = yaml.load(overlay, Loader)
        assert content["dataset_path"] == "/copy"
        assert content["dataset_kwargs"] == {"cache_dir": "/cache"}


class Loader(yaml.SafeLoader):
    """Reads lm-eval's function tags as names."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
