"""The terminal around a command: its width, its encoding, and a reader that closes the output."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers.results import binary_scores, results
from tsdkd.cli import app


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that prints a table with characters outside Latin-1."""
    directory = tmp_path_factory.mktemp("naïve-Ω")
    return ["eval", "--compare", str(results(directory / "Ω", {"gsm8k": binary_scores("10")}).path)]


@pytest.mark.parametrize("columns", ["0", "1", "-5", "abc", "²", "9" * 30, ""])
def test_an_invalid_width_changes_no_value(compared: list[str], columns: str, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, compared, env={"COLUMNS": columns, "LINES": columns})
    assert shown.exit_code == 0
    assert "50.0 ± 50.0" in shown.stdout
    refused = CliRunner().invoke(app, ["artifact", "show", str(tmp_path)], env={"COLUMNS": columns, "LINES": columns})
    assert "error: " in refused.stderr
    assert (
        "--seed" in CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": columns, "LINES": columns}).stdout
    )


@pytest.mark.parametrize(
    "variables",
    [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "latin-1"}],
    ids=str,
)
def test_every_encoding_shows_every_value(compared: list[str], variables: dict[str, str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in {"LC_ALL", "LANG", "PYTHONUTF8"}} | variables
    done = subprocess.run([sys.executable, "-m", "tsdkd", *compared], capture_output=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"50.0" in done.stdout
    assert not done.stderr


def test_a_reader_that_closes_the_output_changes_no_status(compared: list[str], tmp_path: Path) -> None:
    """Nothing is reported, and the command ends with its own status."""
    words = " ".join(f"'{word}'" for word in [sys.executable, "-m", "tsdkd"])
    for command, status, redirection in ((compared, 0, ""), (["artifact", "show", str(tmp_path)], 2, "2>&1")):
        line = f"{words} {' '.join(command)} {redirection} | true; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", f"sleep 0.1; {line}"], capture_output=True, text=True, check=False)
        assert done.returncode == status
        assert "Broken" not in done.stderr
        assert "Traceback" not in done.stderr
        assert "ignored" not in done.stderr


def test_a_closed_output_changes_no_status(compared: list[str]) -> None:
    words = " ".join(f"'{word}'" for word in [sys.executable, "-m", "tsdkd", *compared])
    done = subprocess.run(["bash", "-c", f"{words} >&- 2>&-"], check=False)
    assert done.returncode == 0


def test_a_full_disk_behind_the_output_is_a_line_of_cause_and_one_of_remedy(compared: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tsdkd", *compared], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "try"]
