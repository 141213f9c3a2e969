"""docs/reference.md holds the commands and options as they are."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import run
from tsdkd.cli import reference
from tsdkd.cli.app import COMMANDS


def test_the_page_is_up_to_date() -> None:
    command = [sys.executable, "-m", "tsdkd.cli.reference", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_stale_page_is_reported_and_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "PAGE", tmp_path / "reference.md")
    assert reference.main(["--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert reference.main([]) == 0
    assert reference.main(["--check"]) == 0


def test_every_option_is_on_the_page() -> None:
    page = reference.render()
    for name in COMMANDS:
        command = reference.load_command(name)
        section = page.split(f"## tsdkd {name}")[1].split("\n## ")[0]
        for parameter in getattr(command, "params", ()):
            assert (
                name == "artifact"
                or f"`{max(parameter.opts, key=len) if parameter.param_type_name == 'option' else parameter.metavar}`"
                in section
            )


def test_every_command_shows_its_help() -> None:
    for title in reference.render().split("\n## tsdkd ")[1:]:
        name = title.split("\n", maxsplit=1)[0]
        assert f" {name} [OPTIONS]" in run(*name.split(), "--help")
