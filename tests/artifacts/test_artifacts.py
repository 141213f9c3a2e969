"""Artifacts: a killed writer resumes to the same bytes; readers refuse damaged and wrong artifacts with a remedy."""

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from tsdkd.artifacts import opening
from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.hashing import file_digest
from tsdkd.artifacts.manifest import FORMAT, Manifest, ModelRecord, Parent, load_manifest
from tsdkd.artifacts.reader import check_parents, read_artifact, verify_artifact
from tsdkd.artifacts.schemas import SCHEMAS
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import ArtifactError

Contents = Callable[[Path], dict[str, bytes]]


def manifest(**changes: object) -> Manifest:
    base = Manifest(kind="rollouts", config={"temperature": 1.0}, seed=0, libraries={"torch": "2"})
    return dataclasses.replace(base, **changes)


def rows(*names: str) -> pa.Table:
    text = dict.fromkeys(("prompt_id", "source", "response", "finish_reason", "author"), "text")
    values = {**text, "messages": [{"role": "user", "content": "text"}], "prompt_ids": [3], "teacher_tokens": 0}
    table = [{"sample_id": name, "response_ids": [1, 2], **values} for name in names]
    return pa.Table.from_pylist(table, SCHEMAS["rollouts"])


def write(path: Path, **changes: object) -> None:
    with Writer.open(path, manifest(**changes)) as writer:
        writer.write_table("part-00000.parquet", rows("a", "b"))
        writer.write_table("part-00001.parquet", rows("c"))
        writer.finish({"responses": 3})


def edit(path: Path, **changes: object) -> None:
    file = path / MANIFEST_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_finished_artifact_reads_back_in_order(tmp_path: Path) -> None:
    write(tmp_path / "a")
    artifact = read_artifact(tmp_path / "a", "rollouts")
    assert artifact.table()["sample_id"].to_pylist() == ["a", "b", "c"]
    assert artifact.manifest.rows == 3
    assert artifact.manifest.summary == {"responses": 3}


def test_the_same_work_gives_the_same_bytes(tmp_path: Path, contents: Contents) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_interrupted_writer_resumes_to_the_same_bytes(tmp_path: Path, contents: Contents) -> None:
    write(tmp_path / "whole")
    path = tmp_path / "cut"
    with Writer.open(path, manifest()) as writer:
        writer.write_table("part-00001.parquet", rows("c"))
    (path / "part-00000.parquet.tmp").write_bytes(b"torn")  # what a kill in mid-write leaves
    with Writer.open(path, manifest()) as writer:
        assert writer.has("part-00001.parquet")
        assert not writer.has("part-00000.parquet")
        assert not (path / "part-00000.parquet.tmp").exists()
        writer.write_table("part-00000.parquet", rows("a", "b"))
        writer.finish({"responses": 3})
    assert contents(path) == contents(tmp_path / "whole")


def test_a_complete_artifact_does_not_change(tmp_path: Path, contents: Contents) -> None:
    write(tmp_path / "a")
    before = contents(tmp_path / "a")
    with Writer.open(
        tmp_path / "a", manifest(libraries={"torch": "3"})
    ) as writer:  # a new version of a library changes nothing
        assert writer.complete
    assert contents(tmp_path / "a") == before


def test_a_complete_artifact_on_a_read_only_disk_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a")

    def read_only(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(opening, "lock_for_writing", read_only)
    writer = Writer.open(tmp_path / "a", manifest())
    assert writer.complete
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt
    edit(tmp_path / "a", state="partial")
    with pytest.raises(OSError, match="Read-only"):
        Writer.open(tmp_path / "a", manifest())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"config": {"temperature": 0.5}}, "config.temperature was 1.0, now 0.5"),
        ({"parents": (Parent("prompts", "f" * 64, "p"),)}, "parent prompts was None, now ffffffffffff…"),
    ],
)
def test_another_configuration_is_refused_and_named(
    tmp_path: Path, contents: Contents, changes: dict[str, object], named: str
) -> None:
    write(tmp_path / "a")
    before = contents(tmp_path / "a")
    with pytest.raises(ArtifactError, match=named):
        Writer.open(tmp_path / "a", manifest(**changes))
    assert contents(tmp_path / "a") == before


def test_a_resume_with_other_libraries_is_refused(tmp_path: Path) -> None:
    with Writer.open(tmp_path / "a", manifest()) as writer:
        writer.write_table("part-00000.parquet", rows("a"))
    with pytest.raises(ArtifactError, match="versions were"):
        Writer.open(tmp_path / "a", manifest(libraries={"torch": "3"}))


def test_an_artifact_without_parts_accepts_any_configuration(tmp_path: Path) -> None:
    """A stage that failed after it began, for example on a full disk, does not block the next attempt."""
    Writer.open(tmp_path / "a", manifest()).__exit__()
    with Writer.open(tmp_path / "a", manifest(seed=1)) as writer:
        assert writer.manifest.seed == 1


def test_a_directory_that_is_no_artifact_is_refused_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("text")
    for overwrite in (False, True):
        with pytest.raises(ArtifactError, match="is not an artifact"):
            Writer.open(tmp_path, manifest(), overwrite=overwrite)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_overwrite_refuses_another_kind_and_inputs(tmp_path: Path, contents: Contents) -> None:
    write(tmp_path / "a")
    before = contents(tmp_path / "a")
    with pytest.raises(ArtifactError, match="holds rollouts, not scores"):
        Writer.open(tmp_path / "a", manifest(kind="scores"), overwrite=True)
    record = ModelRecord("student", str(tmp_path / "a"), "w", "t", "c")
    for inputs in ({"models": (record,)}, {"parents": (Parent("rollouts", "f", "."),)}):
        with pytest.raises(ArtifactError, match="is an input and the output"):
            Writer.open(tmp_path / "a", manifest(**inputs), overwrite=True)
    assert contents(tmp_path / "a") == before


def test_a_kill_at_the_start_does_not_block_the_next_writer(tmp_path: Path) -> None:
    for name in (".lock", f"{MANIFEST_FILE}.tmp"):
        (tmp_path / name).write_text("")
    with Writer.open(tmp_path, manifest()) as writer:
        assert not writer.complete


def test_a_stage_that_fails_before_its_first_part_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Writer.open(tmp_path / "a", manifest()):
        raise RuntimeError
    assert not (tmp_path / "a").exists()


def test_an_artifact_that_is_removed_while_it_is_written_does_not_hide_the_error(tmp_path: Path) -> None:
    def work() -> None:
        with Writer.open(tmp_path / "a", manifest()):
            shutil.rmtree(tmp_path / "a")
            raise RuntimeError("the cause")

    with pytest.raises(RuntimeError, match="the cause"):
        work()


def test_add_directory_adds_every_file(tmp_path: Path) -> None:
    (tmp_path / "made" / "more").mkdir(parents=True)
    (tmp_path / "made" / "one").write_text("1")
    (tmp_path / "made" / "more" / "two").write_text("2")
    with Writer.open(tmp_path / "a", manifest(kind="checkpoint")) as writer:
        writer.add_directory(tmp_path / "made")
        writer.finish({})
    assert [part.file for part in read_artifact(tmp_path / "a", "checkpoint").manifest.parts] == ["more/two", "one"]


def test_files_get_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_text("w")
    (source / "model.safetensors").chmod(0o600)  # as safetensors leaves it
    new_file = tmp_path / "new"
    new_file.touch()
    with Writer.open(tmp_path / "out", manifest(kind="checkpoint")) as writer:
        writer.add_directory(source)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == new_file.stat().st_mode


def test_parents_are_found_through_symbolic_links(tmp_path: Path) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "far" / "away")
    write(tmp_path / "parent")
    child = tmp_path / "runs" / "child"
    parent = read_artifact(tmp_path / "parent", "rollouts").as_parent_of(child)
    with Writer.open(child, manifest(kind="checkpoint", parents=(parent,))) as writer:
        made = writer.finish({})
    assert [unchanged for _, _, unchanged in check_parents(child, made.manifest, tmp_path)] == [True]


def test_two_runs_cannot_write_one_artifact(tmp_path: Path) -> None:
    with Writer.open(tmp_path / "a", manifest()), pytest.raises(ArtifactError, match="Another process is writing"):
        Writer.open(tmp_path / "a", manifest())


def test_reading_refuses_a_missing_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        read_artifact(tmp_path / "none", "rollouts")
    assert "Found no rollouts at" in caught.value.cause
    assert "`tsdkd generate`" in caught.value.remedy
    assert "--rollouts" in caught.value.remedy


def test_reading_refuses_another_kind(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with pytest.raises(ArtifactError, match="holds rollouts, not scores"):
        read_artifact(tmp_path / "a", "scores")


def test_reading_refuses_a_partial_artifact(tmp_path: Path) -> None:
    Writer.open(tmp_path / "a", manifest()).__exit__()
    with pytest.raises(ArtifactError, match="not finished"):
        read_artifact(tmp_path / "a", "rollouts")


def test_reading_refuses_a_newer_format(tmp_path: Path) -> None:
    write(tmp_path / "a")
    edit(tmp_path / "a", format=FORMAT + 1, a_field_of_the_future=1)
    with pytest.raises(ArtifactError, match=f"has format {FORMAT + 1}; this tsdkd reads format {FORMAT}") as caught:
        read_artifact(tmp_path / "a", "rollouts")
    assert caught.value.remedy == "Update tsdkd."


def test_an_earlier_format_is_refused_and_replaced_with_overwrite(tmp_path: Path) -> None:
    write(tmp_path / "a")
    edit(tmp_path / "a", format=FORMAT - 1)
    for attempt in (lambda: read_artifact(tmp_path / "a", "rollouts"), lambda: Writer.open(tmp_path / "a", manifest())):
        with pytest.raises(ArtifactError, match=f"has format {FORMAT - 1} of an earlier tsdkd") as caught:
            attempt()
        assert caught.value.remedy == "Run `tsdkd generate` again with --overwrite, or in another directory."
    with Writer.open(tmp_path / "a", manifest(), overwrite=True) as writer:
        writer.finish({})
    assert load_manifest(tmp_path / "a").format == FORMAT


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"format": 2, "kind": "poems"}'])
def test_reading_refuses_a_broken_manifest(tmp_path: Path, text: str) -> None:
    write(tmp_path / "a")
    (tmp_path / "a" / MANIFEST_FILE).write_text(text)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_artifact(tmp_path / "a", "rollouts")


def test_reading_refuses_a_changed_part(tmp_path: Path) -> None:
    write(tmp_path / "a")
    part = tmp_path / "a" / "part-00000.parquet"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1  # one bit, the same length
    part.write_bytes(content)
    with pytest.raises(ArtifactError, match="has a hash that differs"):
        read_artifact(tmp_path / "a", "rollouts")
    with pytest.raises(ArtifactError, match="has a hash that differs"):
        verify_artifact(tmp_path / "a")


def test_reading_refuses_a_missing_part(tmp_path: Path) -> None:
    write(tmp_path / "a")
    (tmp_path / "a" / "part-00001.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"part-00001\.parquet is missing"):
        read_artifact(tmp_path / "a", "rollouts")


def test_other_parents_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "parent")
    write(tmp_path / "other", seed=5)
    parent, other = (read_artifact(tmp_path / name, "rollouts") for name in ("parent", "other"))
    child = tmp_path / "child"
    with Writer.open(child, manifest(kind="scores", parents=(parent.as_parent_of(child),))) as writer:
        scores = writer.finish({})
    scores.require_parent(parent)
    with pytest.raises(ArtifactError, match="made from other rollouts"):
        scores.require_parent(other)


def test_verify_refuses_a_changed_parent(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("one")
    write(tmp_path / "a", parents=(Parent("prompts", file_digest(prompts), "../prompts.jsonl"),))
    verify_artifact(tmp_path / "a")
    prompts.write_text("two")
    with pytest.raises(ArtifactError, match="changed after"):
        verify_artifact(tmp_path / "a")
    prompts.unlink()
    verify_artifact(tmp_path / "a")  # a missing parent is no difference: artifacts are copied without their parents
    checked = check_parents(tmp_path / "a", load_manifest(tmp_path / "a"), tmp_path)
    assert [parent[1:] for parent in checked] == [(False, False)]


def test_verify_refuses_columns_of_another_kind(tmp_path: Path) -> None:
    write(tmp_path / "a")
    edit(tmp_path / "a", kind="results", summary={})
    with pytest.raises(ArtifactError, match="columns or rows that differ"):
        verify_artifact(tmp_path / "a")


def test_a_fingerprint_depends_on_content_not_on_the_path(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", seed=1)
    before = load_manifest(tmp_path / "a").fingerprint
    assert before != load_manifest(tmp_path / "b").fingerprint
    (tmp_path / "a").rename(tmp_path / "moved")
    assert read_artifact(tmp_path / "moved", "rollouts").fingerprint == before


@pytest.mark.parametrize("changes", [{"summary": {"responses": 4}}, {"tsdkd": "9"}, {"sha256": []}])
def test_verify_notices_a_manifest_that_was_changed(tmp_path: Path, changes: dict[str, object]) -> None:
    write(tmp_path / "a")
    verify_artifact(tmp_path / "a")
    edit(tmp_path / "a", **changes)
    with pytest.raises(ArtifactError, match=r"manifest\.json was changed after it was written"):
        verify_artifact(tmp_path / "a")
