"""Every recipe for every pair, expanded to its command lines: tsdkd accepts each with its values."""

import shlex
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from tests.helpers.recipes import PAIRS, PAPER, finish, start
from tsdkd.artifacts.manifest import Manifest, ModelRecord
from tsdkd.cli import app
from tsdkd.stages.results.published import find_table, published_tables

RECORDER = """#!/usr/bin/env bash
case $1 in
  plan) cat "$2" ;;
  *) printf tsdkd; printf ' %q' "$@"; echo ;;
esac >>"$LINES_FILE"
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> "Lines":
    directory = tmp_path_factory.mktemp("recorder")
    (directory / "tsdkd").write_text(RECORDER)
    (directory / "tsdkd").chmod(0o755)
    return Lines(directory)


class Lines:
    """The commands that a recipe would run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def of(self, recipe: str, **environment: str) -> list[str]:
        recorded = self.directory / f"{recipe}{environment}".replace("/", "-")
        if not recorded.exists():
            finish(start(recipe, self.directory, LINES_FILE=recorded, **environment))
        return recorded.read_text().splitlines()

    def dry(self, recipe: str, **environment: str) -> list[str]:
        return self.of(f"paper/{recipe}", DRY_RUN="1", **environment)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that a command reaches with an accepted configuration; none runs."""
    reached: list[str] = []

    def reach(name: str) -> None:
        def stage(*_: object, **__: object) -> None:
            reached.append(name)
            raise typer.Exit

        monkeypatch.setattr(name, stage)

    for name in (
        "generate.stage.generate",
        "score.stage.score",
        "train.stage.train_offline",
        "train.stage.train_online",
        "eval.stage.evaluate",
        "prune.prune",
    ):
        reach(f"tsdkd.stages.{name}")
    reach("tsdkd.stages.report.stage.report")
    reach("tsdkd.stages.inspect.stage.inspect_all")
    reach("tsdkd.artifacts.manifest.load_manifest")
    models = tuple(ModelRecord(role, role, "w", "t", "c") for role in ("teacher", "student"))
    read = SimpleNamespace(manifest=Manifest("checkpoint", config={}, seed=0, models=models))
    monkeypatch.setattr("tsdkd.artifacts.reader.read_artifact", lambda *_, **__: read)
    monkeypatch.setattr("tsdkd.stages.eval.stage.require_measurable", lambda *_: None)
    for role in ("teacher", "student"):
        monkeypatch.setattr(f"tsdkd.cli.defaults.embedded_{role}", lambda: "embedded")
    return reached


def require_accepted(lines: list[str], reached: list[str]) -> None:
    for line in lines:
        name, *words = shlex.split(line)
        assert name == "tsdkd"
        before = len(reached)
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{line}\n{result.output}"
        assert len(reached) == before + 1, line


@pytest.mark.parametrize("recipe", PAPER)
def test_every_line_of_a_paper_recipe_is_accepted(recipe: str, lines: Lines, stages: list[str]) -> None:
    for environment in (*({"PAIR": pair} for pair in PAIRS), {"SCALE": "tiny"}):
        found = lines.dry(recipe, **environment)
        assert [line.split()[1] for line in found[-2:]] == ["eval", "report"]
        rows = [line for line in found if " train " in line]
        assert len(rows) >= 2
        assert len({line.split("--held-out ")[1].split(" --")[0] for line in rows}) == 1  # all rows
        require_accepted(found, stages)


def test_figure_1_reads_responses_of_the_student(lines: Lines, stages: list[str], tmp_path: Path) -> None:
    for environment in (*({"PAIR": pair} for pair in PAIRS), {"SCALE": "tiny"}):
        found = lines.dry("figure1", RUN=str(tmp_path), **environment)
        assert [line.split()[1] for line in found] == ["generate", "score", "inspect"]
        assert "--policy student" in found[0]
        require_accepted(found, stages)


def test_figure_8_shows_the_rows_of_table_1(lines: Lines) -> None:
    assert lines.dry("figure8") == lines.dry("table1")


@pytest.mark.parametrize(("recipe", "environment"), [("quickstart", {}), ("rounds", {"ROUNDS": "2"})])
def test_every_line_of_the_other_recipes_is_accepted(
    recipe: str, environment: dict[str, str], lines: Lines, stages: list[str]
) -> None:
    found = lines.of(recipe, **environment)
    assert len(found) > 6
    require_accepted(found, stages)


@pytest.mark.parametrize(("gkd", "steps"), [("1", 6), ("0", 5)])
def test_the_quickstart_numbers_its_steps(gkd: str, steps: int, tmp_path: Path) -> None:
    (tmp_path / "tsdkd").write_text(RECORDER)
    (tmp_path / "tsdkd").chmod(0o755)
    output = finish(start("quickstart", tmp_path, LINES_FILE=tmp_path / "lines", GKD=gkd))
    headings = [line for line in output.splitlines() if line.startswith("== ")]
    assert [line.partition(":")[0] for line in headings] == [f"== {n} of {steps}" for n in range(1, steps + 1)]


@pytest.mark.parametrize(
    "line",
    ["tsdkd train --k ten", "tsdkd train --objective gkd", "tsdkd train --method seqkd --beta 1", "tsdkd eval x"],
)
def test_a_wrong_line_is_refused(line: str, stages: list[str]) -> None:
    with pytest.raises(AssertionError, match="tsdkd"):
        require_accepted([line], stages)


def trained(found: list[str]) -> dict[str, str]:
    """The training command of each checkpoint."""
    words = [shlex.split(line) for line in found if line.startswith("tsdkd train")]
    return {line[line.index("--checkpoint") + 1]: shlex.join(line) for line in words}


@pytest.mark.parametrize("pair", PAIRS)
def test_one_name_is_one_model_in_all_recipes_of_a_pair(pair: str, lines: Lines) -> None:
    known: dict[str, set[str]] = defaultdict(set)
    for recipe in PAPER:
        for checkpoint, line in trained(lines.dry(recipe, PAIR=pair)).items():
            known[checkpoint].add(line)
    assert f"runs/paper/{pair}/tsdkd" in known
    assert all(len(commands) == 1 for commands in known.values())


def test_every_published_row_is_measured_with_its_table_beside_it(lines: Lines) -> None:
    measured = defaultdict(set)
    for recipe in PAPER:
        words = shlex.split(lines.dry(recipe)[-2])
        models = {word.partition("=")[0] for option, word in pairwise(words) if option == "--model"}
        measured[find_table(words[-1]).names[0]] |= models
    for table in published_tables():
        assert table.rows.keys() <= measured[table.names[0]], table.names


def test_the_pairs_have_their_models_and_rates(lines: Lines) -> None:
    for pair, student, rate in (("gemma2", "google/gemma-2-2b-it", "1e-7"), ("qwen3", "Qwen/Qwen3-1.7B", "5e-6")):
        for line in trained(lines.dry("table3", PAIR=pair)).values():
            assert f"--student {student} " in line
            assert f"--learning-rate {rate}" in line
        assert lines.dry("table3", PAIR=pair)[-2].endswith(f"--paper {pair}")  # table 3 is of another pair
    assert lines.dry("table4") == lines.dry("table1", PAIR="gemma2")


def test_some_rows_alone(lines: Lines) -> None:
    """Responses that they do not need are not sampled; an unknown row is refused with the known ones."""
    some = lines.dry("table1", ROWS="gkd tsdkd")
    assert [line.split()[1] for line in some] == ["train", "train", "eval", "report"]
    refused = finish(
        start("paper/table6", lines.directory, LINES_FILE=lines.directory / "lines", ROWS="tsdkd x", DRY_RUN=1), 2
    )
    assert refused.splitlines() == ["error: No row is named x.", "try:   ROWS with some of: off-policy tsdkd."]


@pytest.mark.parametrize(("name", "value"), [("PAIR", "llama"), ("SCALE", "huge")])
def test_unknown_pairs_and_scales_are_refused(name: str, value: str, lines: Lines) -> None:
    output = finish(start("paper/table1", lines.directory, **{name: value}), 2)
    assert value in output.splitlines()[0]
    assert output.splitlines()[1].startswith(f"try:   {name}=")
