"""Failures and kills leave nothing that a person must remove."""

import os
from pathlib import Path

import pytest

from tsdkd.artifacts import disk, file_system, opening
from tsdkd.artifacts.locks import lock_for_writing
from tsdkd.artifacts.manifest import Manifest
from tsdkd.artifacts.reader import read_artifact
from tsdkd.artifacts.replacing import SAVED_STEPS
from tsdkd.artifacts.schemas import SCHEMAS
from tsdkd.artifacts.writer import TableWriter, Writer

MANIFEST = Manifest("checkpoint", {}, 0)


def write(path: Path) -> None:
    """A complete checkpoint, with every kind of leftover of a kill after its finish in it and beside it."""
    with Writer.open(path, MANIFEST) as writer:
        writer.temporary_path("weights").write_text("w")
        writer.add_file("weights")
        writer.finish({})
    for name in (f"{path.name}/{SAVED_STEPS}/checkpoint-2", f".{path.name}.tsdkd-new", f".{path.name}.tsdkd-old"):
        (path.parent / name).mkdir(parents=True)
        (path.parent / name / "file").touch()
    (path / ".replacement").touch()


def fail(writer: Writer) -> None:
    """End a run as an error inside it does."""
    writer.__exit__(RuntimeError, RuntimeError())


def names(directory: Path) -> list[str]:
    return sorted(str(file.relative_to(directory)) for file in directory.rglob("*"))


@pytest.mark.parametrize("reads", [True, False])
def test_the_next_reader_or_writer_deletes_what_a_kill_after_the_finish_left(tmp_path: Path, reads: bool) -> None:
    write(tmp_path / "c")
    if reads:
        read_artifact(tmp_path / "c", "checkpoint", hashed=False)
    else:
        Writer.open(tmp_path / "c", MANIFEST).__exit__()
    assert names(tmp_path) == ["c", "c/.lock", "c/manifest.json", "c/weights"]


def test_a_reader_deletes_nothing_while_a_process_writes(tmp_path: Path) -> None:
    write(tmp_path / "c")
    before = names(tmp_path)
    with lock_for_writing(tmp_path / "c"):
        read_artifact(tmp_path / "c", "checkpoint")
        assert names(tmp_path) == before


def test_the_saved_steps_of_a_partial_checkpoint_stay(tmp_path: Path) -> None:
    writer = Writer.open(tmp_path / "c", MANIFEST)
    (writer.path / SAVED_STEPS / "checkpoint-2").mkdir(parents=True)
    fail(writer)
    Writer.open(tmp_path / "c", MANIFEST).__exit__()
    assert (tmp_path / "c" / SAVED_STEPS / "checkpoint-2").is_dir()


def test_a_failure_leaves_no_unfinished_part(tmp_path: Path) -> None:
    """The complete part stays; temporary files go."""
    writer = Writer.open(tmp_path / "s", Manifest("scores", {}, 0))
    writer.write_table("one.parquet", SCHEMAS["scores"].empty_table())
    TableWriter(writer.temporary_path("two.parquet"), "scores")
    writer.temporary_path("three").mkdir()
    fail(writer)
    assert names(tmp_path / "s") == [".lock", "manifest.json", "one.parquet"]


@pytest.mark.parametrize("fails_at", ["opening", "work"])
def test_a_failure_before_the_first_part_leaves_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    """Neither the artifact's nor a parent that was made for it; other directories stay."""
    (tmp_path / "runs").mkdir()

    def full(*_: object) -> None:
        raise RuntimeError

    if fails_at == "opening":
        monkeypatch.setattr(opening, "save_manifest", full)
    with pytest.raises(RuntimeError), Writer.open(tmp_path / "runs" / "one" / "c", MANIFEST):
        raise RuntimeError
    assert names(tmp_path) == ["runs"]


def test_a_directory_is_on_disk_before_its_first_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(file_system, "fsync", synced.append)
    with Writer.open(tmp_path / "runs" / "c", MANIFEST):
        assert {tmp_path / "runs" / "c", tmp_path / "runs", tmp_path} == set(synced)


@pytest.mark.parametrize("point", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    page = tmp_path / "report.html"
    disk.replace_text(page, "old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*((disk, "fsync") if point == "fsync" else (Path, "replace")), interrupted)
    with pytest.raises(KeyboardInterrupt):
        disk.replace_text(page, "new")
    assert (names(tmp_path), page.read_text()) == (["report.html"], "old")


def test_a_kill_while_a_page_is_written_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "report.html"
    disk.replace_text(page, "old")
    with monkeypatch.context() as patch:
        patch.setattr(disk, "fsync", lambda _: os._exit(9))
        if (child := os.fork()) == 0:
            disk.replace_text(page, "new")
    assert os.waitpid(child, 0)[1] == 9 << 8
    assert page.read_text() == "old"
    disk.replace_text(page, "new")
    assert (names(tmp_path), page.read_text()) == (["report.html"], "new")
