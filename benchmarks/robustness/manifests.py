"""Damages manifests, journals, logs, results and tables of a small run, and counts commands that end in a raw error.

    python -m benchmarks.robustness.manifests --trials 300 --seed 0

A trial is a mutant with one damage, which several commands read; half of the mutants have the hashes that cover it
corrected, so that later checks are reached. Every command must end well or with a TsdkdError, and change nothing
outside the run. A trial takes a few seconds.
"""

import json
import random
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from typer.testing import CliRunner

from benchmarks.robustness.rows import Row, campaign_parser, write_rows_and_exit
from tests.helpers.models import save_tiny_model
from tests.helpers.prompts import write_prompts
from tsdkd.artifacts.files import JOURNAL_FILE, MANIFEST_FILE
from tsdkd.artifacts.hashing import content_digest, file_digest
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.cli import app
from tsdkd.errors import TsdkdError

VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 2**40, 2**70, float("nan"), float("inf"), "", "text", "x" * 5000, "a\0b", "\ud800"),
    *("../notes.parquet", "/etc/passwd", "..", "\x1b[2J", [], {}, [[1]], {"a": {"b": 1}}, ["a", None]),
)
ARTIFACTS = ("rollouts", "scores", "checkpoint", "results/student", "results/distilled")
LOOK = ("artifact show {a}", "artifact show --config {a}", "artifact verify {a}", "artifact lineage {a}")
COMMANDS = {
    "rollouts": (*LOOK, "score {both} --run {r} --scores {r}/again --signal ranks", "inspect --run {r}"),
    "scores": (*LOOK, "train --run {r} --checkpoint {r}/again {training}", "inspect --run {r} --aggregate"),
    "checkpoint": (*LOOK, "train --run {r} {training}", "report {r} --html {r}/report.html"),
    "results/student": (*LOOK, "eval --compare {r}", "report {r} --html {r}/report.html"),
    "results/distilled": (*LOOK, "eval --compare {r} --format latex", "report {r} --html {r}/report.html"),
}
"""The commands that read each artifact."""
ENDS = ("well", "refused", "usage", "raw")
"""How a command ends."""
FAULTS = ("usage", "raw", "outside")
TRAINING = "--precision float32 --epochs 1 --batch-size 4 --micro-batch-size 2 --k 4 --student {d}/student"


@dataclass(frozen=True)
class Workspace:
    """A small run, whose copies are damaged."""

    path: Path

    def command(self, text: str, run: Path, artifact: Path) -> list[str]:
        both = f"--student {self.path}/student --teacher {self.path}/teacher"
        training = TRAINING.format(d=self.path)
        return text.format(a=artifact, r=run, both=both, training=training).split()


def make_workspace(path: Path) -> Workspace:
    """Tiny models and a run with all artifacts."""
    save_tiny_model(path / "teacher", seed=1, layers=2, width=32)
    save_tiny_model(path / "student", seed=2)
    write_prompts(path / "prompts.jsonl", 4)
    (path / "copies").mkdir()
    (path / "copies" / "notes.parquet").write_text("mine")
    workspace, run = Workspace(path), path / "run"
    sampling = f"--prompts {path}/prompts.jsonl --max-new-tokens 6 --engine transformers"
    models = f"--model student={path}/student --also distilled={{r}}/checkpoint"
    for text in (
        f"generate --run {{r}} --student {path}/student {sampling}",
        "score --run {r} {both} --k 4",
        "train --run {r} {training}",
        f"eval --run {{r}} {models} --tasks embedded --limit 2 --held-out {{r}}",
    ):
        result = CliRunner().invoke(app, ["--debug", *workspace.command(text, run, run)])
        if result.exit_code:
            raise SystemExit(f"{text}\n{result.output}\n{result.exception!r}")
    return workspace


def damage_json(value: Any, generator: random.Random) -> str:
    """Damage a JSON value in place at a drawn depth; returns a description."""
    key = generator.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if isinstance(value[key], dict | list) and value[key] and generator.random() < 0.8:
        return f"{key}.{damage_json(value[key], generator)}"
    damage = generator.random()
    if damage < 0.15:
        del value[key]
        return f"{key} deleted"
    if damage < 0.25 and isinstance(value, list):
        value.append(value[key])
        return f"{key} twice"
    if damage < 0.25:
        value[f"{key}2"] = value.pop(key)
        return f"{key} renamed"
    value[key] = generator.choice(VALUES)
    return f"{key} = {str(value[key])[:30]!r}"


def damage_file(file: Path, generator: random.Random) -> str:
    """Damage one line of JSON lines, or a JSON file; sometimes its bytes."""
    content = file.read_bytes()
    if generator.random() < 0.15:
        bytes_ = generator.choice(
            [b"", b"[]", b"\xff\xfe", b"[" * 100_000, content[: len(content) // 2], b'"text"', b"{}"]
        )
        file.write_bytes(bytes_)
        return f"content {bytes_[:12]!r}"
    lines = content.decode().splitlines() if file.suffix == ".jsonl" else [content.decode()]
    number = generator.randrange(len(lines))
    value = json.loads(lines[number])
    description = damage_json(value, generator)
    lines[number] = json.dumps(value)
    file.write_text("\n".join(lines) + "\n")
    return description


def damage_table(file: Path, generator: random.Random) -> str:
    """Damage one column of a table, or its rows."""
    table = pq.read_table(file)
    name = generator.choice([name for name in table.column_names if table[name].null_count == 0])
    rows, kind = table.to_pylist(), generator.randrange(5)
    row = generator.choice(rows)
    if kind == 0:
        row[name] = None
    elif kind == 1:
        rows = rows[:-1]
    elif kind == 2:
        table = table.rename_columns([f"{other}2" if other == name else other for other in table.column_names])
        rows = table.to_pylist()
    elif isinstance(row[name], list | bytes | str):
        if kind == 3 or isinstance(row[name], bytes | str) or not row[name]:
            row[name] = row[name][: len(row[name]) // 2]
        else:
            number = type(row[name][0]) in {int, float}
            values = (-1, 32_000) if number and type(row[name][0]) is int else (float("nan"), float("-inf"))
            row[name][0] = generator.choice(values) if number else None
    else:
        row[name] = type(row[name])(-1)
    damaged = pa.Table.from_pylist(rows, table.schema)
    pq.write_table(damaged, file, row_group_size=generator.choice([1, 64]))
    return f"{name} by damage {kind}"


def correct_hashes(run: Path) -> None:
    """Correct sizes, hashes and parents of every artifact that can be read."""
    for name in ARTIFACTS:
        file = run / name / MANIFEST_FILE
        try:
            manifest = json.loads(file.read_text())
            for part in manifest["parts"]:
                part |= {
                    "bytes": (run / name / part["file"]).stat().st_size,
                    "sha256": file_digest(run / name / part["file"]),
                }
            for parent in manifest["parents"]:
                if parent["kind"] in ARTIFACTS:
                    parent["fingerprint"] = load_manifest(run / parent["kind"]).fingerprint
            file.write_text(json.dumps(manifest))
        except (TsdkdError, ValueError, TypeError, KeyError, OSError, AttributeError, RecursionError):
            continue


def mutants(workspace: Workspace, seed: int, count: int) -> Iterator[tuple[str, Path, str]]:
    """Artifact, damaged run and description of each mutant."""
    for number in range(count):
        generator = random.Random(f"{seed}-{number}")
        run, name = workspace.path / "copies" / "run", generator.choice(ARTIFACTS)
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(workspace.path / "run", run, symlinks=True)
        manifest, journal = run / name / MANIFEST_FILE, run / name / JOURNAL_FILE
        tables = sorted((run / name).glob("*.parquet"))
        others = [file for file in (journal, *(run / name).glob("metrics.jsonl")) if file.exists()]
        kinds = generator.choices(["manifest", "other", "table"], [6, 2, 3])[0]
        if kinds == "table" and tables:
            file = generator.choice(tables)
            description = damage_table(file, generator)
        else:
            file = generator.choice(others) if kinds == "other" and others else manifest
            description = damage_file(file, generator)
        if generator.random() < 0.5 or kinds != "manifest":
            correct_hashes(run)
        if generator.random() < 0.25 and file != manifest:  # the stage resumes
            content = json.loads(manifest.read_text())
            manifest.write_text(json.dumps(content | {"state": "partial"}))
        yield name, run, f"{number}: {name}/{file.name}: {description}"


def outcome(words: list[str]) -> tuple[str, BaseException | None]:
    """How a command ends: "well", "refused", "usage", or "raw" with the error."""
    result = CliRunner().invoke(app, ["--debug", *words])
    if result.exit_code == 0:
        return "well", None
    if isinstance(result.exception, TsdkdError):
        return "refused", result.exception
    return ("usage", None) if isinstance(result.exception, SystemExit) else ("raw", result.exception)


def campaign(
    workspace: Workspace, seed: int, count: int, show: Callable[[str], None], commands: Mapping[str, Sequence[str]]
) -> Counter[tuple[str, str]]:
    """Outcomes by command and kind; changes outside the run count as "outside". `commands`: by artifact."""
    counts: Counter[tuple[str, str]] = Counter()
    for name, run, description in mutants(workspace, seed, count):
        for text in commands[name]:
            words = workspace.command(text, run, run / name)
            kind, error = outcome(words)
            counts[" ".join(words[: 2 if words[0] == "artifact" else 1]), kind] += 1
            if kind == "raw":
                frames = "".join(traceback.format_exception(error)).splitlines()[-7:]
                show("\n".join([f"{description}: {' '.join(words)}", *frames]))
        outside = {file.name for file in (workspace.path / "copies").iterdir()}
        if outside != {"run", "notes.parquet"} or (workspace.path / "copies" / "notes.parquet").read_text() != "mine":
            counts["any", "outside"] += 1
            show(f"{description}: wrote outside ({outside})")
    return counts


def main() -> None:
    options = campaign_parser(__doc__, trials=300).parse_args()
    with TemporaryDirectory() as directory:
        workspace = make_workspace(Path(directory))
        before = content_digest(workspace.path / "run")
        counts = campaign(workspace, options.seed, options.trials, partial(print, flush=True), COMMANDS)
        unchanged = content_digest(workspace.path / "run") == before
    if not unchanged:
        counts["any", "outside"] += 1
    rows = [
        Row(
            command,
            sum(counts[command, kind] for kind in ENDS),
            sum(counts[command, kind] for kind in FAULTS),
            {kind: counts[command, kind] for kind in (*ENDS, "outside")},
        )
        for command in sorted({command for command, _ in counts})
    ]
    write_rows_and_exit("Damaged manifests and tables", rows, options.json)


if __name__ == "__main__":
    main()
