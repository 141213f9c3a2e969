"""Artifacts: what is written can be killed, resumed and trusted; what is wrong is refused with a remedy."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from tsdkd.artifacts.hashing import file_digest
from tsdkd.artifacts.manifest import FORMAT, MANIFEST_FILE, Manifest, ModelRecord, Parent, load_manifest
from tsdkd.artifacts.reader import check_parents, read_artifact, verify_artifact
from tsdkd.artifacts.schemas import SCHEMAS
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import ArtifactError

Contents = Callable[[Path], dict[str, bytes]]


def manifest(**changes: object) -> Manifest:
    base = Manifest(kind="rollouts", config={"temperature": 1.0}, seed=0, libraries={"torch": "2"})
    return dataclasses.replace(base, **changes)


def rows(*names: str) -> pa.Table:
    return pa.Table.from_pylist([{"sample_id": name, "response_ids": [1, 2]} for name in names], SCHEMAS["rollouts"])


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


def test_a_complete_artifact_is_left_alone(tmp_path: Path, contents: Contents) -> None:
    write(tmp_path / "a")
    before = contents(tmp_path / "a")
    with Writer.open(tmp_path / "a", manifest(libraries={"torch": "3"})) as writer:  # an upgrade does not undo it
        assert writer.complete
    assert contents(tmp_path / "a") == before


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


def test_overwrite_replaces(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with Writer.open(tmp_path / "a", manifest(seed=1), overwrite=True) as writer:
        assert not writer.complete
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [".lock", MANIFEST_FILE]


def test_a_resume_with_other_libraries_is_refused(tmp_path: Path) -> None:
    with Writer.open(tmp_path / "a", manifest()) as writer:
        writer.write_table("part-00000.parquet", rows("a"))
    with pytest.raises(ArtifactError, match="versions were"):
        Writer.open(tmp_path / "a", manifest(libraries={"torch": "3"}))


def test_an_artifact_without_content_takes_any_configuration(tmp_path: Path) -> None:
    """A stage that was refused after it began (a full disk, say) does not block the next try."""
    Writer.open(tmp_path / "a", manifest()).__exit__()
    with Writer.open(tmp_path / "a", manifest(seed=1)) as writer:
        assert writer.manifest.seed == 1


def test_a_directory_of_something_else_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ArtifactError, match="is not an artifact"):
            Writer.open(tmp_path, manifest(), overwrite=overwrite)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_overwrite_never_takes_another_kind_or_an_input(tmp_path: Path, contents: Contents) -> None:
    write(tmp_path / "a")
    before = contents(tmp_path / "a")
    with pytest.raises(ArtifactError, match="holds rollouts, not scores"):
        Writer.open(tmp_path / "a", manifest(kind="scores"), overwrite=True)
    me = ModelRecord("student", str(tmp_path / "a"), "w", "t", "c")
    for inputs in ({"models": (me,)}, {"parents": (Parent("rollouts", "f", "."),)}):
        with pytest.raises(ArtifactError, match="is an input and the output"):
            Writer.open(tmp_path / "a", manifest(**inputs), overwrite=True)
    assert contents(tmp_path / "a") == before


def test_a_kill_at_the_very_start_locks_nobody_out(tmp_path: Path) -> None:
    for name in (".lock", f"{MANIFEST_FILE}.tmp"):
        (tmp_path / name).write_text("")
    with Writer.open(tmp_path, manifest()) as writer:
        assert not writer.complete


def test_a_stage_that_fails_before_it_has_anything_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Writer.open(tmp_path / "a", manifest()):
        raise RuntimeError
    assert not (tmp_path / "a").exists()


def test_directories_are_adopted_whole(tmp_path: Path) -> None:
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
    fresh = tmp_path / "fresh"
    fresh.touch()
    with Writer.open(tmp_path / "out", manifest(kind="checkpoint")) as writer:
        writer.add_directory(source)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == fresh.stat().st_mode


def test_parents_are_found_through_symbolic_links(tmp_path: Path) -> None:
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "far" / "away")
    write(tmp_path / "parent")
    child = tmp_path / "runs" / "child"
    parent = read_artifact(tmp_path / "parent", "rollouts").as_parent_of(child)
    with Writer.open(child, manifest(kind="checkpoint", parents=(parent,))) as writer:
        made = writer.finish({})
    assert [same for _, _, same in check_parents(child, made.manifest)] == [True]


def test_processes_of_one_run_share_the_parts_out(tmp_path: Path, contents: Callable[[Path], dict[str, bytes]]) -> None:
    """Whatever the order in which two write, each part is written once, and the artifact is that of one."""
    write(tmp_path / "one")
    with Writer.open(tmp_path / "two", manifest()) as first:
        first.share()
        with Writer.join(tmp_path / "two") as second:
            assert first.claim("part-00000.parquet")
            assert not second.claim("part-00000.parquet")  # being written
            assert second.claim("part-00001.parquet")
            first.write_table("part-00000.parquet", rows("a", "b"))
            assert not second.claim("part-00000.parquet")  # written
            second.write_table("part-00001.parquet", rows("c"))
        first.finish({"responses": 3})
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_part_of_a_process_that_is_gone_can_be_claimed(tmp_path: Path) -> None:
    with Writer.open(tmp_path / "a", manifest()) as first:
        first.share()
        with Writer.join(tmp_path / "a") as second:
            assert second.claim("part-00000.parquet")
        assert first.claim("part-00000.parquet")


def test_nobody_else_writes_while_any_process_of_a_run_does(tmp_path: Path) -> None:
    """The first is gone; the one that joined still writes."""
    first = Writer.open(tmp_path / "a", manifest())
    first.share()
    with Writer.join(tmp_path / "a"):
        first.__exit__()
        with pytest.raises(ArtifactError, match="Another process is writing"):
            Writer.open(tmp_path / "a", manifest())
    Writer.open(tmp_path / "a", manifest()).__exit__()


def test_two_writers_cannot_meet(tmp_path: Path) -> None:
    with Writer.open(tmp_path / "a", manifest()), pytest.raises(ArtifactError, match="Another process is writing"):
        Writer.open(tmp_path / "a", manifest())


def test_reading_refuses_what_is_not_there(tmp_path: Path) -> None:
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
        assert not writer.complete
    assert load_manifest(tmp_path / "a").format == FORMAT


def test_a_claim_holds_while_a_library_replaces_the_file(tmp_path: Path) -> None:
    """safetensors writes under a name of its own and renames: a lock on the file itself would be gone."""
    with Writer.open(tmp_path / "a", manifest()) as first:
        first.share()
        with Writer.join(tmp_path / "a") as second:
            assert first.claim("head.safetensors")
            for content in (b"old", b"new"):
                (tmp_path / "elsewhere").write_bytes(content)
                (tmp_path / "elsewhere").replace(first.temporary_path("head.safetensors"))
            assert not second.claim("head.safetensors")
            first.add_file("head.safetensors")
            assert not second.claim("head.safetensors")
    assert {file.suffix for file in (tmp_path / "a").iterdir()} <= {"", ".json", ".safetensors"}


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


def test_foreign_parents_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "mine")
    write(tmp_path / "other", seed=5)
    mine, other = (read_artifact(tmp_path / name, "rollouts") for name in ("mine", "other"))
    child = tmp_path / "child"
    with Writer.open(child, manifest(kind="scores", parents=(mine.as_parent_of(child),))) as writer:
        scores = writer.finish({})
    scores.require_parent(mine)
    with pytest.raises(ArtifactError, match="made from other rollouts"):
        scores.require_parent(other)


def test_verify_sees_a_parent_that_changed(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("one")
    write(tmp_path / "a", parents=(Parent("prompts", file_digest(prompts), "../prompts.jsonl"),))
    verify_artifact(tmp_path / "a")
    prompts.write_text("two")
    with pytest.raises(ArtifactError, match="changed after"):
        verify_artifact(tmp_path / "a")
    prompts.unlink()
    verify_artifact(tmp_path / "a")  # gone is not wrong: artifacts travel without their parents
    assert [(there, same) for _, there, same in check_parents(tmp_path / "a", load_manifest(tmp_path / "a"))] == [
        (False, False)
    ]


def test_verify_sees_columns_that_do_not_fit(tmp_path: Path) -> None:
    write(tmp_path / "a")
    edit(tmp_path / "a", kind="results")
    with pytest.raises(ArtifactError, match="columns or rows that differ"):
        verify_artifact(tmp_path / "a")


def test_a_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", seed=1)
    before = load_manifest(tmp_path / "a").fingerprint
    assert before != load_manifest(tmp_path / "b").fingerprint
    (tmp_path / "a").rename(tmp_path / "moved")
    assert read_artifact(tmp_path / "moved", "rollouts").fingerprint == before
