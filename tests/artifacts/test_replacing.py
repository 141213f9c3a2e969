"""A complete artifact stays complete until its replacement or extension is, also after failures and kills."""

import errno
import fcntl
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.helpers.artifacts import EXTENDED, NEW, OLD, add, text_of, write
from tsdkd.artifacts import opening, replacing
from tsdkd.artifacts.files import JOURNAL_FILE, LOCK_FILE
from tsdkd.artifacts.journal import read_sessions, record_session
from tsdkd.artifacts.locks import reading_inputs, register_input
from tsdkd.artifacts.manifest import HUB_DATASET, Manifest, ModelRecord, Parent, load_manifest, save_manifest
from tsdkd.artifacts.reader import Artifact, read_artifact, verify_artifact
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import ArtifactError, InputError, TsdkdError

Contents = Callable[[Path], dict[str, bytes]]
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "ctypes.dlopen"}
"""Audit events of the operations that change a directory; `ctypes` exchanges two of them."""


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def interrupt(path: Path, manifest: Manifest, **more: object) -> Path:
    """Write one more part of the artifact, and end early. Returns the directory that is written."""
    with (
        suppress(KeyboardInterrupt),
        Writer.open(path, manifest, **more) as writer,
        record_session(writer.path, "interrupted", []),
    ):
        add(writer, "two" if writer.has("one") else "one", "new")
        raise KeyboardInterrupt
    return writer.path


def extend(path: Path) -> Artifact:
    with Writer.open(path, EXTENDED, may_differ={"config.tasks"}) as writer:
        for file in ("one", "two"):
            add(writer, file, "new")
        return writer.finish({"text": "new"})


def siblings(path: Path) -> list[str]:
    return sorted(file.name for file in path.resolve().parent.iterdir() if file.name.startswith("."))


def test_the_old_artifact_stays_until_the_new_one_is_complete(tmp_path: Path, contents: Contents) -> None:
    write(tmp_path / "a")
    before = contents(tmp_path / "a")
    with Writer.open(tmp_path / "a", NEW, overwrite=True) as writer:
        add(writer, "one", "new")
        assert contents(tmp_path / "a") == before
        made = writer.finish({"text": "new"})
        assert (writer.path, made.path) == (tmp_path / "a", tmp_path / "a")
    write(tmp_path / "b", NEW, "new")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert siblings(tmp_path / "a") == []


@pytest.mark.parametrize("error", [InputError("A cause.", "A remedy."), KeyboardInterrupt()])
def test_a_failure_before_the_first_part_keeps_the_old_artifact(
    tmp_path: Path, contents: Contents, error: BaseException
) -> None:
    write(tmp_path / "a")
    before = contents(tmp_path / "a")
    for more in ({"overwrite": True}, {"may_differ": {"config.tasks"}}):
        manifest = NEW if "overwrite" in more else EXTENDED
        with pytest.raises(type(error)), Writer.open(tmp_path / "a", manifest, **more):
            raise error
        assert contents(tmp_path / "a") == before
        assert siblings(tmp_path / "a") == []


@pytest.mark.parametrize("overwrite", [True, False])
def test_an_interrupted_replacement_resumes(tmp_path: Path, overwrite: bool) -> None:
    """Also without --overwrite, since the pending directory has the requested identity."""
    write(tmp_path / "a")
    interrupt(tmp_path / "a", NEW, overwrite=True)
    assert text_of(tmp_path / "a") == "old"
    write(tmp_path / "a")  # the old command finds its artifact complete
    with Writer.open(tmp_path / "a", NEW, overwrite=overwrite) as writer:
        assert [part.file for part in writer.manifest.parts] == ["one"]
    assert write(tmp_path / "a", NEW, "new", overwrite=overwrite).manifest.summary == {"text": "new"}
    assert text_of(tmp_path / "a") == "new"


def test_looking_at_a_pending_directory_keeps_it(tmp_path: Path) -> None:
    """A kill before the exchange leaves it complete."""
    write(tmp_path / "a")
    pending = interrupt(tmp_path / "a", NEW, overwrite=True)
    save_manifest(pending, replace(load_manifest(pending), state="complete", summary={"text": "new"}))
    verify_artifact(pending)
    verify_artifact(tmp_path / "a")
    assert write(tmp_path / "a", NEW, "newer", overwrite=True).manifest.summary == {"text": "new"}


def test_an_interrupted_replacement_of_another_identity_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "a")
    interrupt(tmp_path / "a", NEW, overwrite=True)
    with Writer.open(tmp_path / "a", replace(NEW, seed=2), overwrite=True) as writer:
        assert writer.manifest.parts == ()
    with pytest.raises(ArtifactError, match="seed was 0, now 1"):
        Writer.open(tmp_path / "a", NEW)


def test_a_damaged_interrupted_replacement_is_begun_again(tmp_path: Path) -> None:
    write(tmp_path / "a")
    written = interrupt(tmp_path / "a", NEW, overwrite=True)
    (written / "one").write_text("damaged")
    assert write(tmp_path / "a", NEW, "new", overwrite=True).manifest.seed == 1
    assert text_of(tmp_path / "a") == "new"


def test_overwrite_resumes_a_partial_artifact_of_the_same_identity_and_replaces_any_other(tmp_path: Path) -> None:
    interrupt(tmp_path / "a", OLD, overwrite=True)
    with Writer.open(tmp_path / "a", OLD, overwrite=True) as writer:
        assert writer.path == tmp_path / "a"
        assert writer.has("one")
    write(tmp_path / "a", NEW, "new", overwrite=True)
    assert text_of(tmp_path / "a") == "new"


def kill_before_change(kill_at: int) -> None:
    """Count the changes that this process makes to files and directories, and kill it before one of them."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in CHANGES or (event == "open" and int(arguments[2]) & (os.O_WRONLY | os.O_RDWR)):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def ends_in_a_child(work: Callable[[], object], kill_at: int) -> bool:
    """Whether work ends in a child process that is killed before its change number `kill_at`."""
    child = os.fork()
    if child == 0:
        try:
            kill_before_change(kill_at)
            work()
        finally:
            os._exit(sys.exc_info()[0] is not None)
    status = os.waitpid(child, 0)[1]
    assert status in {0, signal.SIGKILL}
    return status == 0


@pytest.mark.parametrize(
    ("kind", "atomic"),
    [("another identity", True), ("the same identity", True), ("extension", True), ("the same identity", False)],
)
def test_kill_9_before_any_change_leaves_the_old_or_the_new_artifact(
    tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch, kind: str, atomic: bool
) -> None:
    """After each kill the artifact is complete, old or new, and a new one stays. The next run completes the new one."""
    if not atomic:
        monkeypatch.setattr(replacing, "_exchange_names", lambda *_: False)
    manifest = NEW if kind == "another identity" else OLD

    def work(path: Path) -> Artifact:
        return extend(path) if kind == "extension" else write(path, manifest, "new", overwrite=True)

    expected, found = tmp_path / "expected", list[str]()
    write(expected)
    work(expected)
    for kill_at in range(1, 1000):
        path = tmp_path / f"{kill_at}" / "a"
        write(path)
        ended = ends_in_a_child(lambda path=path: work(path), kill_at)
        found.append(text_of(path))
        if not ended:
            if found[-1] == "new":
                assert (
                    write(path, manifest).manifest.summary == {"text": "new"} if kind != "extension" else extend(path)
                )
                assert text_of(path) == "new"
            else:
                work(path)
        if ended or found[-1] == "old":
            assert contents(path) == contents(expected)
            assert siblings(path) == []
        if ended:
            break
    assert found == sorted(found, reverse=True)  # old, then new
    assert found.count("old") > 10
    assert found.count("new") > 2


def test_an_extension_shares_the_files_and_keeps_the_journal(tmp_path: Path, contents: Contents) -> None:
    write(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with record_session(tmp_path / "a", "first", []):
        pass
    before, journal = contents(tmp_path / "a"), (tmp_path / "a" / JOURNAL_FILE).read_bytes()
    written = interrupt(tmp_path / "a", EXTENDED, may_differ={"config.tasks"})
    assert (written / "one").stat().st_ino == (tmp_path / "a" / "one").stat().st_ino
    assert contents(tmp_path / "a") == before
    assert (tmp_path / "a" / JOURNAL_FILE).read_bytes() == journal
    extend(tmp_path / "a")
    assert [session.command for session in read_sessions(tmp_path / "a")] == ["first", "interrupted"]
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    assert [part.file for part in read_artifact(tmp_path / "a", "checkpoint").manifest.parts] == ["one", "two"]


@pytest.mark.parametrize(("owner", "name"), [(Path, "mkdir"), (opening, "make_pending"), (opening, "save_manifest")])
def test_a_full_disk_as_a_replacement_begins_leaves_the_artifact_and_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    write(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(TsdkdError, match="No space left") as kept:
            Writer.open(tmp_path / "a", NEW, overwrite=True)
    assert text_of(tmp_path / "a") == "old"
    write(tmp_path / "a", NEW, "new", overwrite=True)
    assert text_of(tmp_path / "a") == "new"
    assert kept.value.__traceback__ is not None  # it does not keep the locks


def test_overwrite_does_not_resume_an_extension(tmp_path: Path) -> None:
    """--overwrite makes every part again."""
    write(tmp_path / "a")
    interrupt(tmp_path / "a", EXTENDED, may_differ={"config.tasks"})
    with Writer.open(tmp_path / "a", EXTENDED, overwrite=True) as writer:
        assert writer.manifest.parts == ()


@pytest.mark.parametrize(
    "location",
    ["a/prompts.jsonl", "a/deeper/still/prompts.jsonl", "link/prompts.jsonl", "a/out/prompts.jsonl", "to-it"],
)
@pytest.mark.parametrize("output", ["a", "link", "b/../a"])
def test_an_input_inside_the_output_is_refused(tmp_path: Path, location: str, output: str) -> None:
    write(tmp_path / "a")
    for directory in ("b", "outside", "a/deeper/still"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "a" / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "a" / "inside").touch()
    (tmp_path / "to-it").symlink_to("a/inside")
    source = tmp_path / location
    source.touch()
    with reading_inputs():
        register_input(source)
        with pytest.raises(ArtifactError, match=r"is inside .*, which --overwrite replaces"):
            Writer.open(tmp_path / output, NEW, overwrite=True)
    assert text_of(tmp_path / "a") == "old"
    assert source.exists()


def test_recorded_inputs_inside_the_output_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "ab")  # a name that only begins with the name of the output
    (tmp_path / "a" / "inside").touch()
    inside = str(tmp_path / "a" / "inside")
    for inputs in (
        {"parents": (Parent("prompts", "f", "inside"),)},
        {"parents": (Parent(HUB_DATASET, "f", inside),)},
        {"models": (ModelRecord("student", inside, "w", "t", "c"),)},
    ):
        with pytest.raises(ArtifactError, match="is inside"):
            Writer.open(tmp_path / "a", replace(NEW, **inputs), overwrite=True)
    Writer.open(tmp_path / "a", replace(NEW, parents=(Parent("x", "f", "../ab"),)), overwrite=True).__exit__()


def test_links_inside_the_old_artifact_are_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "a")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").touch()
    (tmp_path / "a" / "directory").symlink_to(tmp_path / "outside")
    (tmp_path / "a" / "file").symlink_to(tmp_path / "outside" / "file")
    (tmp_path / "a" / "broken").symlink_to("nowhere")
    write(tmp_path / "a", NEW, "new", overwrite=True)
    assert text_of(tmp_path / "a") == "new"
    assert not (tmp_path / "a" / "directory").is_symlink()
    assert (tmp_path / "outside" / "file").exists()


@pytest.mark.parametrize("existing", [True, False])
def test_an_output_that_is_a_link_is_written_to_its_target(tmp_path: Path, existing: bool) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "a")
    if existing:
        write(tmp_path / "far" / "a")
    with pytest.raises(ZeroDivisionError), Writer.open(tmp_path / "link", NEW, overwrite=True):
        raise ZeroDivisionError  # and not "cannot call rmtree on a symbolic link"
    assert write(tmp_path / "link", NEW, "new", overwrite=True).path == tmp_path / "link"
    assert text_of(tmp_path / "far" / "a") == text_of(tmp_path / "link") == "new"
    assert (tmp_path / "link").is_symlink()
    assert siblings(tmp_path / "far" / "a") == []


def test_a_pending_directory_has_the_name_of_its_artifact(tmp_path: Path) -> None:
    """Its config.yaml names the model of results by the name of their directory."""
    write(tmp_path / "a")
    with Writer.open(tmp_path / "a", NEW, overwrite=True) as writer:
        assert replacing.artifact_name(writer.path) == replacing.artifact_name(tmp_path / "a") == "a"


def test_a_file_as_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("text")
    with pytest.raises(ArtifactError, match="is not an artifact"):
        Writer.open(tmp_path / "a", OLD, overwrite=True)


def test_no_other_run_writes_while_one_replaces(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with Writer.open(tmp_path / "a", NEW, overwrite=True) as first:
        add(first, "one", "new")
        with pytest.raises(ArtifactError, match="Another process is writing"):
            Writer.open(tmp_path / "a", NEW, overwrite=True)
        first.finish({"text": "new"})
        with pytest.raises(ArtifactError, match="Another process is writing"):
            Writer.open(tmp_path / "a", OLD, overwrite=True)
    assert text_of(tmp_path / "a") == "new"


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a")
    monkeypatch.setattr(Path, "is_mount", lambda _: True)
    with pytest.raises(ArtifactError, match="is a mount point"):
        Writer.open(tmp_path / "a", NEW, overwrite=True)


def test_a_writer_that_waited_for_a_replaced_directory_locks_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is opened before the exchange, and taken after it."""
    write(tmp_path / "a")
    real, calls = fcntl.flock, []

    def flock(file: object, operation: int) -> None:
        if not calls:
            calls.append(file)
            (tmp_path / "a" / LOCK_FILE).unlink()
            (tmp_path / "a" / LOCK_FILE).touch()
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with Writer.open(tmp_path / "a", OLD), pytest.raises(ArtifactError, match="Another process is writing"):
        Writer.open(tmp_path / "a", OLD)


def test_an_earlier_format_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "a")
    manifest = tmp_path / "a" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(ZeroDivisionError), Writer.open(tmp_path / "a", NEW, overwrite=True):
        raise ZeroDivisionError
    assert '"format": 1' in manifest.read_text()
    write(tmp_path / "a", NEW, "new", overwrite=True)
    assert load_manifest(tmp_path / "a").seed == 1
