"""Imports point one way: cli -> stages -> core; and help costs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import write_prompts
from tsdkd.stages.config import GenerateConfig, ScoreConfig
from tsdkd.stages.generate import generate
from tsdkd.stages.score import score

PACKAGE = Path(__file__).parents[1] / "tsdkd"
MODULES = sorted(PACKAGE.rglob("*.py"))
STAGES = {"generate", "score", "train", "eval", "prune", "inspect", "report"}


def imported(module: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("tsdkd.")}


def room(name: str) -> str:
    return name.split(".")[1]


MAY_USE = {
    "core": {"core", "errors"},
    "stages": {"stages", "core", "artifacts", "writer", "journal", "errors"},
    "cli": {"cli", "stages", "core", "artifacts", "journal", "errors", "__version__"},
    "journal": {"artifacts", "errors"},
    "artifacts": {"errors", "__version__"},
    "writer": {"artifacts", "errors"},
    "errors": set(),
    "__main__": {"cli"},
    "__init__": set(),
    "embedded": set(),
}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(module: Path) -> None:
    place = module.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert {room(name) for name in imported(module)} <= MAY_USE[place]


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stages_never_import_each_other(stage: str) -> None:
    others = {f"tsdkd.stages.{other}" for other in STAGES - {stage}}
    assert not imported(PACKAGE / "stages" / f"{stage}.py") & others


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
    [[], ["generate"], ["score"], ["train"], ["eval"], ["prune"], ["inspect"], ["report"], ["artifact"], ["plan"]],
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
    for more in (["--sample", "largest-gap", "--opener", "adaptive"], ["--aggregate"]):
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
