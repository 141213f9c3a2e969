"""Manifests and journals are untrusted: every field is checked on reading, with one error."""

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.helpers.artifacts import OLD, add
from tests.helpers.runs import STUDENT, make_run
from tsdkd.artifacts.files import JOURNAL_FILE, MANIFEST_FILE
from tsdkd.artifacts.journal import read_sessions
from tsdkd.artifacts.json_files import read_regular_file
from tsdkd.artifacts.manifest import load_manifest, teachers_by_name
from tsdkd.artifacts.reader import read_artifact, run_of
from tsdkd.artifacts.rules import all_differ
from tsdkd.artifacts.writer import Writer
from tsdkd.cli import app
from tsdkd.errors import ArtifactError
from tsdkd.stages.report.runs import load_runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def set_field(path: Path, names: str, value: Any) -> None:
    """Replace a field of a manifest, named such as "parts.0.file"."""
    file = path / MANIFEST_FILE
    content = field = json.loads(file.read_text())
    *outer, last = [int(name) if name.isdigit() else name for name in names.split(".")]
    for name in outer:
        field = field[name]
    field[last] = value
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name",
    [
        *("../notes.parquet", "/tmp/notes.parquet", "a/../../notes.parquet", "..", ".", "", "a//b", "./a", "a\\b"),
        *("a\0b", "a\nb", "a\x1b[2Jb", "a\u202eb", "x" * 256, MANIFEST_FILE, ".lock", "config.yaml", "a.tmp"),
    ],
)
def test_a_part_lies_inside_its_artifact(run: Path, name: str) -> None:
    set_field(run / "rollouts", "parts.0.file", name)
    with pytest.raises(ArtifactError, match=r"parts\[0\].file is .* cannot name a part"):
        load_manifest(run / "rollouts")


@pytest.mark.parametrize(
    ("names", "value", "problem"),
    [
        ("kind", [], "kind is"),
        ("kind", "poems", "kind is poems, not one of"),
        ("format", "2", "format is 2, not int"),
        ("format", True, "format is True, not int"),
        ("seed", 0.5, "seed is 0.5, not int"),
        ("seed", 1 << 63, "64 bits"),
        ("seed", "x", "seed is x"),
        ("state", "nearly", "state is nearly"),
        ("engine", {"name": 1}, "engine is"),
        ("engine", "a\x1b[2J", "engine is not a short printable text"),
        ("engine", "x" * 257, "engine is not a short printable text"),
        ("libraries", {"torch": 2}, "libraries.torch is 2"),
        ("day", "yesterday", "day is 'yesterday'"),
        ("parents", {}, "parents is {}, not a list"),
        ("parents.0", "rollouts", r"parents\[0\] is rollouts"),
        ("parents.0.path", None, r"parents\[0\].path is None"),
        ("parents.0.path", "a\0b", r"parents\[0\].path is not the name of a file"),
        ("parents.0.path", "x" * 256, r"parents\[0\].path is not the name of a file"),
        ("parents.0.path", "x/" * 2500, r"parents\[0\].path is not the name of a file"),
        ("parents.0", {"kind": "rollouts"}, r"parents\[0\].fingerprint is missing"),
        ("models.0.name", 3, r"models\[0\].name is 3"),
        ("parts.0.rows", -1, r"parts\[0\].rows is -1"),
        ("parts.0.rows", 1.5, r"parts\[0\].rows is 1.5"),
        ("parts.0.bytes", "many", r"parts\[0\].bytes is many"),
        ("parts.0.sha256", "0" * 63, r"parts\[0\].sha256 is .* not a SHA-256"),
        ("parts.0.sha256", "A" * 64, r"parts\[0\].sha256 is .* not a SHA-256"),
        ("config", [], "config is"),
        ("config.k", "10", "config.k is 10, not int"),
        ("config.k", 0, "config.k is 0, out of its range"),
        ("config.signal", "smoke", "config.signal is smoke"),
        ("summary", "done", "summary is done"),
        ("summary.response_tokens", None, "summary has response_tokens 'None', not a number"),
        ("summary.response_tokens", "\ud800", "surrogates"),
    ],
)
def test_every_field_is_checked(run: Path, names: str, value: Any, problem: str) -> None:
    set_field(run / "scores", names, value)
    with pytest.raises(ArtifactError, match=problem):
        load_manifest(run / "scores")


def test_many_names_are_compared_once() -> None:
    class Name(str):
        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Name.compared += 1
            return super().__eq__(other)

    parts = [SimpleNamespace(file=Name(number)) for number in (*range(1_000), 999)]
    assert all_differ("file")(parts) == "has file '999' twice"
    assert Name.compared < 2_000


@pytest.mark.parametrize("names", ["parents", "models", "parts"])
def test_nothing_is_listed_twice(run: Path, names: str) -> None:
    entries = json.loads((run / "scores" / MANIFEST_FILE).read_text())[names]
    set_field(run / "scores", names, [*entries, entries[0]])
    with pytest.raises(ArtifactError, match=f"{names} has .* twice"):
        load_manifest(run / "scores")


@pytest.mark.parametrize(
    ("kind", "names", "value"),
    [
        ("rollouts", "summary.responses", "four"),
        ("rollouts", "config.max_new_tokens", 0.5),
        ("checkpoint", "config.objective.k", []),
        ("checkpoint", "config.objective.k", 0),
        ("checkpoint", "config.objective.opener", "wide"),
        ("checkpoint", "config.lora", 3),
        ("checkpoint", "config.online", True),
        ("checkpoint", "config.held_out", 7),
        ("checkpoint", "summary.steps", "8"),
        ("checkpoint", "summary.loss_first", None),
        ("results/student", "config.tasks", "gsm8k"),
        ("results/student", "summary.gsm8k", 0.5),
        ("results/student", "summary.gsm8k.value", "half"),
        ("results/student", "summary.gsm8k.value", True),
        ("results/student", "summary.held_out.kl", [1]),
    ],
)
def test_settings_and_summaries_have_the_types_of_their_stage(run: Path, kind: str, names: str, value: Any) -> None:
    set_field(run / kind, names, value)
    with pytest.raises(ArtifactError, match=rf"cannot be read \(.*\b{names.rsplit('.', maxsplit=1)[-1]}\b"):
        load_manifest(run / kind)


def test_a_setting_that_is_missing_is_named_where_it_is_needed(run: Path) -> None:
    manifest = json.loads((run / "scores" / MANIFEST_FILE).read_text())
    del manifest["config"]["signal"]
    (run / "scores" / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="records no 'signal'"):
        load_manifest(run / "scores").config["signal"]
    with pytest.raises(ArtifactError, match="records no author model"):
        load_manifest(run / "scores").model("author")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[]", "not an object"),
        (b"null", "not an object"),
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe{}", "can't decode"),
        (b'{"format": NaN}', "NaN, which is not JSON"),
        (b'{"format": 1e999}', "a number that is not finite"),
        (b'{"format": -9223372036854775809}', "a number that 64 bits do not hold"),
        (b'{"format": %s}' % (b"9" * 5000), "Exceeds the limit"),
        (b'{"format": 2, "format": 2}', "a key twice"),
        (b'{"\\ud800": 2}', "surrogates not allowed"),
        (b'{"a":' * 31 + b"1" + b"}" * 31, "kind is missing"),
        (b'{"a":' * 32 + b"1" + b"}" * 32, "nested too deeply"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'"%s"' % (b"x" * (1 << 25)), "more than 32 MiB"),
        (b'"%s"' % (b"x" * ((1 << 22) + 1)), "a text of more than"),
    ],
    ids=lambda value: str(value[:12]),
)
def test_an_invalid_manifest_is_one_error(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"cannot be read \(.*{reason}"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_a_manifest_is_a_regular_file(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / MANIFEST_FILE)
    with pytest.raises(ArtifactError, match=r"cannot be read \((not a regular file|a directory)"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("size", [100, 1 << 42])
def test_a_file_is_read_in_memory_of_its_size_and_of_the_limit(tmp_path: Path, size: int) -> None:
    (tmp_path / MANIFEST_FILE).touch()
    os.truncate(tmp_path / MANIFEST_FILE, size)
    tracemalloc.start()
    with suppress(ValueError):
        read_regular_file(tmp_path / MANIFEST_FILE, 1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < min(size, 1 << 20) + (1 << 18)


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b'{"started": 1}',
        b'{"started": "now", "command": "c", "machine": []}',
        b'{"started": "now", "command": "c", "machine": "m", "seconds": -1}',
        b"\xff",
        b"[" * 100_000,
    ],
    ids=lambda line: str(line[:60]),
)
def test_a_journal_of_other_types_is_one_error(tmp_path: Path, line: bytes) -> None:
    (tmp_path / JOURNAL_FILE).write_bytes(line + b"\n")
    with pytest.raises(ArtifactError, match=r"cannot be read .* no part of the artifact"):
        read_sessions(tmp_path)


@pytest.mark.parametrize("name", [JOURNAL_FILE, "config.yaml", "resume"])
def test_a_stage_writes_through_no_link_to_files_outside(tmp_path: Path, name: str) -> None:
    with Writer.open(tmp_path / "a", OLD) as writer:
        add(writer, "one", "old")
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "a" / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ArtifactError, match="links to a file outside its artifact"):
        Writer.open(tmp_path / "a", OLD)
    (tmp_path / "a" / name).unlink()
    (tmp_path / "a" / ".lock").unlink()
    (tmp_path / "a" / ".lock").symlink_to(tmp_path / "nowhere")
    with Writer.open(tmp_path / "a", OLD) as writer:
        writer.finish({})
    assert not (tmp_path / "nowhere").exists()
    assert (tmp_path / "outside").read_text() == "mine"


def test_a_loop_of_links_stays_inside(run: Path) -> None:
    with Writer.open(run / "a", OLD) as writer:
        add(writer, "one", "old")
    (run / "a" / "loop").symlink_to("loop")
    Writer.open(run / "a", OLD).__exit__()
    set_field(run / "rollouts", "parents.0.path", "../a")
    result = CliRunner().invoke(app, ["--debug", "artifact", "lineage", str(run / "rollouts")])
    assert "(changed since)" in result.output


def test_nothing_outside_the_run_is_hashed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr("tsdkd.artifacts.reader.content_digest", lambda path: hashed.append(path.resolve()) or "")
    secret, link = run.parent / "secret", run / "inside"
    secret.mkdir()
    link.mkdir()
    (link / "file").symlink_to("/etc/hostname")
    for path in ("../../secret", str(secret), "/etc", "../inside"):
        set_field(run / "rollouts", "parents.0.path", path)
        (run_,) = load_runs([run])
        assert [problem for artifact in run_.artifacts for problem in artifact.problems if "secret" in problem] == []
        result = CliRunner().invoke(app, ["artifact", "lineage", str(run / "rollouts")])
        assert "outside the run, not checked" in result.output
        set_field(run / "rollouts", "sha256", None)
        result = CliRunner().invoke(app, ["artifact", "verify", str(run / "rollouts")])
        assert "outside the run, not checked" in result.output
    assert hashed == []
    set_field(run / "rollouts", "parents.0.path", "../prompts.jsonl")
    assert "changed since" in CliRunner().invoke(app, ["artifact", "lineage", str(run / "rollouts")]).output
    assert hashed == [(run / "prompts.jsonl").resolve()]


def test_the_prompts_of_a_run_are_inside_it_for_each_of_its_artifacts(tmp_path: Path) -> None:
    for artifact in ("rollouts", "results/student"):
        assert run_of(tmp_path / "run" / artifact) == tmp_path / "run"


def test_the_lineage_of_many_artifacts_ends(run: Path) -> None:
    """Each artifact of a chain names the next one twice, as a parent and as a model."""
    for number in range(12):
        path, after = run / f"a{number}", f"../a{number + 1}"
        shutil.copytree(run / "rollouts", path)
        set_field(path, "parents.0", {"kind": "checkpoint", "fingerprint": "f", "path": after})
        set_field(path, "models", [{**asdict(STUDENT), "role": str(i), "name": str(path / after)} for i in range(3)])
    result = CliRunner().invoke(app, ["--debug", "artifact", "lineage", str(run / "a0")])
    assert "more than 200 artifacts" in str(result.exception)


@pytest.mark.parametrize("parts", [[], None])
def test_rollouts_and_scores_have_rows(run: Path, parts: list[Any] | None) -> None:
    manifest = json.loads((run / "scores" / MANIFEST_FILE).read_text())
    manifest |= {"parts": parts}
    if parts is None:
        del manifest["parts"]
    (run / "scores" / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="lists no row"):
        read_artifact(run / "scores", "scores", hashed=False)


def test_teachers_are_ordered_by_name_and_one_alone_has_none() -> None:
    assert list(teachers_by_name({"math": "a", "code": "b"}).items()) == [("code", "b"), ("math", "a")]
    assert teachers_by_name("a") == {"": "a"}
