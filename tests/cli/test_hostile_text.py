"""Every printing function and page escapes names, paths and responses of any content."""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.tree import Tree
from typer.testing import CliRunner

from tests.helpers.hostile_text import HOSTILE, is_harmless
from tests.helpers.runs import make_run
from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.cli import app, console, progress
from tsdkd.cli.show_comparison import Format, show_comparison
from tsdkd.printable import escape_controls
from tsdkd.stages.results.compare import Comparison, Score


def _log_a_minute(text: str) -> None:
    lines = progress.ProgressLines(console.err, text, 10, text, 0)
    lines.last_line = lines.start = lines.start - 100
    lines.metrics({text: 1.0})
    lines.advance(5)


PRINTERS: dict[str, Callable[[str], object]] = {
    "pairs": lambda text: console.show_pairs(text, [(text, text)]),
    "table": lambda text: console.show_table(text, [text, "b"], [[text, text]]),
    "text": console.show_text,
    "tree": lambda text: console.show_tree(Tree(text)),
    "next": console.show_next,
    "error": lambda text: console.show_error(text, text),
    "traceback": console.show_traceback,
    "info": lambda text: console.ConsoleObserver().info(text),
    "warning": lambda text: console.ConsoleObserver().warning(text),
    "observer's table": lambda text: console.ConsoleObserver().table(text, [(text, text)]),
    "progress in a log": _log_a_minute,
}


@pytest.mark.parametrize("printer", PRINTERS)
@pytest.mark.parametrize("text", HOSTILE)
def test_every_printing_function_escapes(printer: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    PRINTERS[printer](text)
    shown = "".join(capsys.readouterr())
    assert shown.strip()
    assert is_harmless(shown), shown
    assert text.startswith("[red]") <= ("[red]markup[/red]" in shown)  # markup is text


@pytest.mark.parametrize("printer", ["error", "next", "info", "warning"])
def test_a_line_break_forges_no_line(printer: str, capsys: pytest.CaptureFixture[str]) -> None:
    PRINTERS[printer](HOSTILE[-2])
    lines = "".join(capsys.readouterr()).splitlines()
    assert len(lines) == (2 if printer == "error" else 1)


@pytest.mark.parametrize("text", HOSTILE)
def test_the_live_view_escapes(text: str) -> None:
    """Its own cursor moves and colours reach the terminal, and no other."""
    terminal = io.StringIO()
    live = console.SafeConsole(file=terminal, force_terminal=True, color_system="standard", width=120)
    with progress.progress_bar(live, text, 10, text, 0) as (advance, metrics):
        metrics({text: 1.0})
        advance(5)
    own = re.sub(r"\x1b\[[0-9;?]*[ABCDGKhlm]", "", terminal.getvalue()).replace("\r", "")
    assert "5/10" in own
    assert is_harmless(own), own


def test_pages_and_commands_escape_names_paths_and_responses(tmp_path: Path) -> None:
    """One run whose every text is hostile: artifact show, its --config, lineage, report, compare."""
    text = "".join(HOSTILE).replace("\0", "")
    run = make_run(tmp_path / f"run{HOSTILE[0]}{HOSTILE[4]}a|b`c&d%_e\n", response=text)
    for manifest in run.rglob(MANIFEST_FILE):
        content = json.loads(manifest.read_text())
        for model in content["models"]:
            model["name"] = text
        manifest.write_text(json.dumps(content))
    commands = [
        *(["artifact", "show", run / kind] for kind in ("rollouts", "checkpoint")),
        ["artifact", "show", "--config", run / "checkpoint"],
        ["artifact", "lineage", run / "checkpoint"],
        ["artifact", "lineage", run / "results" / "student"],
        ["report", run],
        *(["eval", "--compare", run, "--format", name] for name in ("terminal", "markdown", "latex", "csv")),
    ]
    for command in commands:
        result = CliRunner().invoke(app, [str(word) for word in command])
        assert result.exit_code == 0, (command, result.output)
        assert is_harmless(result.output.replace("\r\n", "\n")), command
    page = (run / "report.html").read_text(encoding="utf-8")
    assert is_harmless(page)
    assert "\u27e8202e\u27e9evil" in page
    shown = CliRunner().invoke(app, ["artifact", "show", "--config", str(run / "checkpoint")]).stdout
    assert yaml.safe_load(shown)["student"] == text


@pytest.mark.parametrize("text", [name for name in HOSTILE if "\0" not in name and "/" not in name])
def test_a_file_name_in_an_error_is_escaped(tmp_path: Path, text: str) -> None:
    for command in (["artifact", "show", tmp_path / text], ["plan", tmp_path / text], ["score", f"--{text}"]):
        result = CliRunner().invoke(app, [str(word) for word in command])
        assert result.exit_code == 2
        assert is_harmless(result.output)
        assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["error", "try"]


def compared(name: str, capsys: pytest.CaptureFixture[str], format_: Format, *benchmarks: str) -> str:
    scores = {name: dict.fromkeys(benchmarks, Score(0.5, 0.1, 4))}
    comparison = Comparison(benchmarks, name, scores, {}, {}, {}, (f"{name} has a note",))
    show_comparison([comparison], format_)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_stays_in_its_cell(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In the header of a table of two benchmarks, and in the row of a table of one."""
    for benchmarks, named in ((("gsm8k", "sciq"), 0), (("gsm8k",), 2)):
        markdown = compared(name, capsys, "markdown", *benchmarks).splitlines()
        rows = [line for line in markdown if line.startswith("|")]
        assert len(rows) == 2 + len(benchmarks)
        assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows} == {3}
        assert not re.search(r"(?<!\\)[<`*&_]", rows[named])
        assert len(markdown) == len(rows) + 4  # title, rows and note, with blank lines between
    latex = compared(name, capsys, "latex", "gsm8k", "sciq").splitlines()
    header = next(line for line in latex if line.endswith(r"\\"))
    assert len(re.findall(r"(?<!\\)&", header)) == 1
    assert not re.search(r"(?<!\\)[%#_]", header)
    assert all(line.startswith(("%", "\\", "benchmark", "gsm8k", "sciq")) for line in latex if line)
    (row,) = csv.DictReader(io.StringIO(compared(name, capsys, "csv", "gsm8k")))
    assert not row["model"].startswith("=")


def test_a_name_of_ordinary_characters_stays_as_it_is() -> None:
    for text in ("naïve Ω 語 العربية 🙂 ❤️", "runs/a-b_c/x.y"):
        assert escape_controls(text) == text
