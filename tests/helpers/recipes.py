"""The recipes as processes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
PAPER = sorted(path.stem for path in (RECIPES / "paper").glob("*.sh") if path.stem not in {"preamble", "figure1"})
"""The recipes that train and measure rows."""
PAIRS = ("qwen2.5", "gemma2", "qwen3")


def start(recipe: str, tsdkd: Path, **environment: object) -> subprocess.Popen[str]:
    """A recipe such as "paper/table1", which finds its `tsdkd` in that folder."""
    variables = {name: str(value) for name, value in environment.items()}
    variables |= {"INSTALLED": "1", "PYTHON": sys.executable, "PATH": f"{tsdkd}:{os.environ['PATH']}", "COLUMNS": "200"}
    return subprocess.Popen(
        ["bash", str(RECIPES / f"{recipe}.sh")],
        env=os.environ | variables,
        cwd=tsdkd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    """The recipe's output; fails unless it ends with `status`."""
    output = process.communicate(timeout=1800)[0]
    assert process.returncode == status, output
    return output
