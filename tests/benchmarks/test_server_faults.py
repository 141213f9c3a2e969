"""The faults of a teacher's server: each ends the command with the message that the page shows."""

import re
from pathlib import Path

import pytest

from benchmarks.robustness.server_faults import FAULTS, Fault, FaultResult, replace_table, run_faults, table_of

PAGE = Path(__file__).parents[2] / "docs" / "served_teacher.md"
CHECKED = [fault for fault in FAULTS if fault.name != "answers too late"]  # its clock needs a quiet machine


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FaultResult]:
    return run_faults(tmp_path_factory.mktemp("faults"), CHECKED)


@pytest.mark.parametrize("fault", CHECKED, ids=lambda fault: fault.name)
def test_each_fault_is_refused_and_nothing_is_lost(fault: Fault, results: dict[str, FaultResult]) -> None:
    assert results[fault.name].outcome == "refused"
    assert results[fault.name].parts == fault.later


def test_the_page_has_the_messages(results: dict[str, FaultResult]) -> None:
    page = _without_numbers(PAGE.read_text())
    missing = [row for row in _without_numbers(table_of(results)).splitlines() if row not in page]
    assert not missing, "python -m benchmarks.robustness.server_faults --page docs/served_teacher.md"


def test_the_table_of_a_page_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Before.\n\n{table_of({'is old': FaultResult('refused', 'a', 'b', 0)})}\nAfter.\n")
    replace_table(page, table := table_of({"is new": FaultResult("refused", "c", "d", 0)}))
    assert page.read_text() == f"Before.\n\n{table}\nAfter.\n"


def _without_numbers(text: str) -> str:
    return re.sub(r"[0-9]", "", text)
