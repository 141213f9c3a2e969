"""Imports point one way: cli -> stages -> core; and help costs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.prompts import write_prompts
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.generate.stage import generate
from tsdkd.stages.score.stage import score

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tsdkd"
MODULES = sorted(PACKAGE.rglob("*.py"))
ROOMS = (
    "errors",
    "printable",
    "processes",
    "child_processes",
    "artifacts",
    "core",
    "stages.observer",
    "stages.methods",
    "methods",
    "stages.config",
    "stages.__init__",
    "stages.metrics",
    "stages.pages",
    "stages.models",
    "stages.parallel",
    "stages.teacher_server",
    "stages.data",
    "stages.engines",
    "stages.results",
)
"""Each room imports only rooms listed before it; commands import all of them, and no other command."""
STAGES = ("generate", "score", "train", "eval", "prune", "inspect", "report", "plan", "doctor", "share")
COMMANDS = tuple(f"stages.{name}" for name in STAGES)


def imported(module: Path, package: str = "tsdkd") -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith(f"{package}.")}


def room(name: str) -> str:
    """The room of a dotted module name, such as "core" or "stages.data"."""
    parts = name.split(".")
    return ".".join(parts[1:3]) if parts[1] == "stages" else parts[1]


def allowed(of: str) -> set[str]:
    if of in ROOMS:
        return set(ROOMS[: ROOMS.index(of) + 1])
    if of in COMMANDS:
        return {*ROOMS, of}
    return {*ROOMS, *COMMANDS, "cli"} if of == "cli" else {"cli"}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(module: Path) -> None:
    own = room(".".join(("tsdkd", *module.relative_to(PACKAGE).with_suffix("").parts)))
    assert {room(name) for name in imported(module)} - {"__version__", "stages"} <= allowed(own)


def test_shared_test_code_lies_in_helpers() -> None:
    modules = [module for folder in ("tests", "benchmarks") for module in (ROOT / folder).rglob("*.py")]
    names = {(str(module.relative_to(ROOT)), name) for module in modules for name in imported(module, "tests")}
    assert not {(module, name) for module, name in names if not f"{name}.".startswith("tests.helpers.")}


@pytest.mark.parametrize(
    "module", [m for m in MODULES if {"stages", "core"} & set(m.relative_to(PACKAGE).parts)], ids=lambda path: path.stem
)
def test_stages_and_core_neither_print_nor_exit(module: Path) -> None:
    called = {
        node.func.id
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not called & {"print", "exit", "quit"}
    assert "sys.exit" not in module.read_text()


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["generate"],
        ["score"],
        ["train"],
        ["eval"],
        ["prune"],
        ["inspect"],
        ["report"],
        ["artifact"],
        ["plan"],
        ["doctor"],
    ],
    ids=" ".join,
)
def test_help_loads_no_torch(command: list[str]) -> None:
    program = (
        "import sys\nfrom tsdkd.cli import main\n"
        f"sys.argv = ['tsdkd', *{command}, '--help']\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'lm_eval'}\n"
        "try:\n    main()\nfinally:\n    assert not heavy & set(sys.modules)\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "Usage: tsdkd" in found.stdout


def test_looking_at_scores_loads_no_torch(student: Path, teacher: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.jsonl", 2)
    generate(prompts, str(student), tmp_path / "rollouts", GenerateConfig(max_new_tokens=4))
    score(tmp_path / "rollouts", str(student), str(teacher), tmp_path / "scores", ScoreConfig(k=4))
    for more in (["--sample-id", "largest-gap", "--opener", "adaptive"], ["--aggregate"]):
        page = tmp_path / "page.html"
        program = (
            "import sys\nfrom tsdkd.cli import main\n"
            f"sys.argv = ['tsdkd', 'inspect', '--run', {str(tmp_path)!r}, '--html', {str(page)!r}, *{more}]\n"
            "try:\n    main()\nfinally:\n    assert not {'torch', 'transformers'} & set(sys.modules)\n"
        )
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
        assert page.is_file()


def test_core_loads_lazily_but_completely() -> None:
    import tsdkd.core

    for name in dir(tsdkd.core):
        assert getattr(tsdkd.core, name).__name__ == name
    with pytest.raises(AttributeError):
        tsdkd.core.nothing  # noqa: B018
