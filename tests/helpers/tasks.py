"""lm-eval's tasks of the real benchmarks."""

from functools import cache
from typing import Any

from tests.helpers.prompts import REAL_DATA
from tsdkd.stages.eval import harness
from tsdkd.stages.results.benchmarks import BENCHMARKS


@cache
def tasks_of(name: str) -> Any:
    return harness.load_tasks(BENCHMARKS[name], REAL_DATA / "benchmarks", None)
