"""The scripts for a GPU run at tiny sizes on a CPU, keep their figures, and go on where they stopped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.common import Figures, Options

ROOT = Path(__file__).parents[2]
SCRIPTS = ("a_devices", "b_objective", "c_score", "d_training", "e_sampling")


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("figures")
    run(out)
    return out


def run(out: Path, *more: str) -> str:
    words = [sys.executable, "benchmarks/gpu/run.py", "--tiny", "--out", str(out), "--seconds", "900", *more]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout


def test_every_script_measures_all_that_it_can(figures: Path) -> None:
    """Peers that are not installed are the only rows that may fail."""
    for script in SCRIPTS:
        content = json.loads((figures / f"{script}.json").read_text())
        assert content["figures"], script
        assert all(name.startswith(("TRL", "Liger")) for name in content["failed"]), content["failed"]
        assert content["environment"]["tiny"] == "True"


def test_a_figure_that_is_measured_is_not_measured_again(figures: Path) -> None:
    before = (figures / "c_score.json").read_bytes()
    shown = run(figures, "c")
    assert "c_score: complete" in shown
    assert (figures / "c_score.json").read_bytes() == before


def test_an_error_is_recorded_and_the_next_figure_begins(tmp_path: Path) -> None:
    measured = Figures("x", Options(tmp_path, tiny=True, seconds=60))
    measured.measure("broken", lambda: {"value": 1 / 0})
    measured.measure("whole", lambda: {"value": 2.0})
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["figures"] == {"whole": {"value": 2.0}}
    assert "ZeroDivisionError" in content["failed"]["broken"]
    with pytest.raises(SystemExit, match="1"):
        measured.finish("x", ["value"], ["broken", "whole"])


def test_no_figure_is_begun_when_the_time_is_over(tmp_path: Path) -> None:
    measured = Figures("x", Options(tmp_path, tiny=True, seconds=-1))
    measured.measure("late", lambda: {"value": 1.0})
    assert not measured.values
