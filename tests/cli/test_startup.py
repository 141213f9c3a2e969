"""Help and version are quick: commands load when they are called."""

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.helpers.own_methods import write_method
from tsdkd.cli.app import COMMANDS

HEAVY = {"torch", "transformers", "yaml", "asyncio", "unittest", "pyarrow", "matplotlib", "importlib.metadata"}
MINIMAL = """
import sys
from typing import Annotated
import typer
app = typer.Typer(rich_markup_mode="rich")
@app.callback()
def root(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    "Help."
@app.command(rich_help_panel="Commands")
def command() -> None:
    "Help."
try:
    app(["--help"])
finally:
    print(len(sys.modules), file=sys.stderr)
"""


def modules(program: str) -> str:
    """The modules that a program prints."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()[-1]


def tsdkd(printed: str, *words: str) -> str:
    return (
        f"import sys\nfrom tsdkd.cli import main\nsys.argv = ['tsdkd', *{words}]\n"
        f"try:\n    main()\nfinally:\n    print({printed}, file=sys.stderr)\n"
    )


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_app_imports_little_more_than_typer(option: str) -> None:
    loaded = modules(tsdkd("len(sys.modules)", option))
    assert int(loaded) <= 1.8 * int(modules(MINIMAL))
    assert modules(tsdkd(f"sorted({HEAVY} & set(sys.modules))", option)) == "[]"
    assert modules(tsdkd("sorted(m for m in sys.modules if m.startswith('tsdkd.cli.'))", option)) == "['tsdkd.cli.app']"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_loads_no_torch(command: str) -> None:
    assert (
        modules(tsdkd("sorted({'torch', 'transformers', 'pyarrow', 'lm_eval'} & set(sys.modules))", command, "--help"))
        == "[]"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_repeats_their_docstrings(name: str) -> None:
    module = import_module(f"tsdkd.cli.{name}")
    help_ = module.app.info.help if hasattr(module, "app") else inspect.getdoc(module.command)
    assert help_.splitlines()[0] == COMMANDS[name].help


def test_a_mistake_in_a_method_is_named_before_the_stage_loads(tmp_path: Path) -> None:
    text = "def select(features, options):\n    return {'d': 1 / 0}\n"
    arguments = 'name="m", full_name="m", description="m", losses={"d": Divergence.jsd(0)}, select=select'
    file = write_method(
        tmp_path / "m.py", f"from tsdkd.methods import Divergence, Method\n{text}\nMETHOD = Method({arguments})\n"
    )
    program = tsdkd("sorted({'peft', 'tsdkd.stages.train.stage'} & set(sys.modules))", "train", "--method", str(file))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "select of the method m fails (ZeroDivisionError" in done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
