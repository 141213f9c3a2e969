"""The benchmark of packing runs at tiny sizes."""

from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import packing
from tests.helpers.scored_runs import scored_run


def test_tables_of_packing(
    student: Path,
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = scored_run(tmp_path, student, teacher)
    monkeypatch.setattr(packing, "peak", lambda _attention, tokens, _part: 1000 * tokens)
    console = Console(width=120)
    packing.show_differences(console)
    packing.show_memory(console, [256, 512])
    packing.show_rates(console, run, str(student), str(teacher), 1)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("gemma3_text", "soft-cap", "score", "train"))


@pytest.mark.parametrize("family", ["gemma2", "qwen2"])
def test_packed_and_alone_differ_by_rounding(family: str) -> None:
    assert max(packing.differences(family)) < 1e-5


def test_a_step_needs_memory() -> None:
    assert packing.peak("full", 256, "step") > 256 * 4 * packing.SHAPE["hidden_size"]
