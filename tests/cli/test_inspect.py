"""`tsdkd inspect` on the command line: terminal output and the path of the page."""

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.helpers.prompts import write_prompts
from tsdkd.cli import app, show_inspection
from tsdkd.stages.config.inspect import InspectConfig
from tsdkd.stages.inspect.stage import inspect_scores

COMMANDS = (
    ["generate", "--max-new-tokens", "9"],
    ["score", "--k", "4"],
    ["train", "--k", "3", "--opener", "0.5", "--batch-size", "2", "--epochs", "1", "--precision", "float32"],
)


def run(*words: object) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def trained(student: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a checkpoint."""
    directory = tmp_path_factory.mktemp("trained")
    prompts = write_prompts(directory / "prompts.jsonl", 4)
    inputs = (["--student", student, "--prompts", prompts], ["--teacher", teacher], [])
    for command, options in zip(COMMANDS, inputs, strict=True):
        run(*command, "--run", directory, *options)
    return directory


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """The output on a terminal of 80 columns, without paged text."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="truecolor", width=80, highlight=False)
    monkeypatch.setattr("tsdkd.cli.show_inspection.out", console)
    monkeypatch.setattr("tsdkd.cli.console.out", console)
    return screen


def test_piped_output_is_plain_text(trained: Path) -> None:
    for options in ([], ["--aggregate"], ["--after", trained / "checkpoint"]):
        shown = run("inspect", "--run", trained, *options).stdout
        assert "\x1b" not in shown
        assert max(len(line.rstrip()) for line in shown.splitlines()) < 400


def test_the_table_shows_the_requested_positions(trained: Path) -> None:
    """With marks, both entropies, agreement, gate, and the candidates in the student's order."""
    response = inspect_scores(trained / "scores", InspectConfig(k=3, opener=0.5))
    shown = run("inspect", "--run", trained, "--positions", "2-4").stdout
    table = shown[shown.index("[teacher's") :]
    assert re.findall(r"^ *(\d+) [o ]", table, re.MULTILINE) == ["2", "3", "4"]
    for token in response.tokens[1:4]:
        (line,) = [line for line in table.splitlines() if line.split()[:1] == [str(token.position)]]
        before = token.before
        assert f"{before.student_entropy:.2f} " in line
        assert f"{before.teacher_entropy:.2f} {before.agreement:.2f} {token.gate:.2f}" in " ".join(line.split())
        assert re.match(r" *\d+ (o?e?)", line)[1] == "o" * token.in_opener + "e" * token.in_entropy_term
        order = [f"[{candidate.rank}]" for candidate in before.candidates]
        assert re.findall(r"\[\d+\]", table[table.index(line) :])[:3] == order


def test_the_checkpoints_objective_is_the_default_and_is_reported(trained: Path) -> None:
    result = run("inspect", "--run", trained, "--em-ratio", 0.3)
    assert f"those that trained {trained / 'checkpoint'}" in " ".join(result.stderr.split())
    assert "(c = 0.5)" in result.stdout
    assert "(ratio 0.3)" in result.stdout


def test_the_last_line_is_the_path_of_the_page(trained: Path, tmp_path: Path) -> None:
    for options, title in (([], "token by token"), (["--aggregate"], "Selection in")):
        page = tmp_path / "page.html"
        assert run("inspect", "--run", trained, "--html", page, *options).stdout.splitlines()[-1] == str(page)
        assert title in page.read_text()


def test_models_replace_missing_scores(trained: Path, teacher: Path, tmp_path: Path) -> None:
    sample = inspect_scores(trained / "scores", InspectConfig()).sample_id
    options = ["--rollouts", trained / "rollouts", "--teacher", teacher, "--sample-id", sample]
    options += ["--k", 3, "--opener", 0.5]
    assert (
        run("inspect", "--run", tmp_path, *options).stdout
        == run("inspect", "--run", trained, "--sample-id", sample).stdout
    )


def test_a_terminal_shows_colours(trained: Path, terminal: io.StringIO) -> None:
    response = inspect_scores(trained / "scores", InspectConfig(opener=0.5))
    show_inspection.show_response(response)
    shown = terminal.getvalue()
    level = max(token.before.level for token in response.tokens)
    red, green, blue = (int(show_inspection.COLOURS[level][-6:][i : i + 2], 16) for i in (0, 2, 4))
    assert f"48;2;{red};{green};{blue}" in shown
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert "".join(t.text for t in response.tokens[: response.opener_length]) + show_inspection.OPENER_END in plain
    assert max(map(len, plain.splitlines())) <= 80


def test_a_terminal_gets_a_pager(trained: Path, terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    paged: list[str] = []
    monkeypatch.setattr("pydoc.pager", paged.append)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("LESS", "-R")
    show_inspection.show_response(inspect_scores(trained / "scores", InspectConfig()))
    assert "\x1b[" in paged[0]
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("name", ["page.txt", "folder.html", "missing/page.html"])
def test_only_html_files_are_written(trained: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "page.txt").write_text("before")
    for command in ("inspect", "--run"), ("report",):
        result = CliRunner().invoke(app, [*command, str(trained), "--html", str(tmp_path / name)])
        assert result.exit_code == 2
        assert "--html" in result.stderr or ".html" in result.stderr
    assert (tmp_path / "page.txt").read_text() == "before"
