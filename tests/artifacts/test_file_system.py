"""A file system that does not support the operations of artifacts is refused before a write; locks name their host."""

import errno
import fcntl
import mmap
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.artifacts import NEW, OLD, text_of, write
from tsdkd.artifacts import file_system, locks
from tsdkd.artifacts.file_system import locks_reach_other_hosts
from tsdkd.artifacts.files import LOCK_FILE, MANIFEST_FILE
from tsdkd.artifacts.locks import Holder, has_readers, read_holder
from tsdkd.artifacts.reader import read_artifact
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import ArtifactError, TsdkdError

OTHER = Holder(7, "another-boot", "gpu9")


@pytest.fixture(params=["/dev/shm", "disk"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Below a file system in memory, and below that of the tests."""
    if request.param == "disk":
        yield tmp_path
        return
    made = Path("/dev/shm", f"tsdkd-test-{os.getpid()}")
    if not made.parent.is_dir():
        pytest.skip("no file system in memory")
    made.mkdir()
    yield made
    subprocess.run(["rm", "-r", made], check=True)


def test_file_systems_of_this_machine_support_artifacts(directory: Path) -> None:
    write(directory / "a")
    write(directory / "a", NEW, "new", overwrite=True)
    assert text_of(directory / "a") == "new"
    assert {file.name for file in (directory / "a").iterdir()} == {LOCK_FILE, MANIFEST_FILE, "one"}
    program = (
        "import sys; from pathlib import Path; from tests.helpers.artifacts import OLD\n"
        "from tsdkd.artifacts.writer import Writer; Writer.open(Path(sys.argv[1]), OLD)"
    )
    with Writer.open(directory / "b", OLD):
        command = [sys.executable, "-c", program, str(directory / "b")]
        other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"(process {os.getpid()} on {Holder.own().host})" in other.stderr


def failing(real: Callable[..., Any], code: int, only: Callable[..., bool] = lambda *_: True) -> Callable[..., Any]:
    """A call that fails as that of a file system that does not implement it, where `only` holds for its arguments."""

    def call(*arguments: Any, **more: Any) -> Any:
        if only(*arguments):
            raise OSError(code, os.strerror(code))
        return real(*arguments, **more)

    return call


def is_directory(descriptor: Any) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor if isinstance(descriptor, int) else descriptor.fileno()).st_mode)


def appends(_: Path, mode: str = "r", *__: object) -> bool:
    return mode == "ab"


LACKING: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "cannot lock a file (No locks available)": (fcntl, "flock", failing(fcntl.flock, errno.ENOLCK)),
    "cannot lock a file (Function not implemented)": (fcntl, "flock", failing(fcntl.flock, errno.ENOSYS)),
    "cannot lock a file (Operation not supported)": (fcntl, "flock", failing(fcntl.flock, errno.EOPNOTSUPP)),
    "grants an exclusive lock twice": (fcntl, "flock", lambda *_: None),
    "cannot write a file to disk (Invalid argument)": (
        os,
        "fsync",
        failing(os.fsync, errno.EINVAL, lambda file: not is_directory(file)),
    ),
    "cannot write the names in a directory to disk (Invalid argument)": (
        os,
        "fsync",
        failing(os.fsync, errno.EINVAL, is_directory),
    ),
    "cannot append to a file (Operation not supported)": (
        Path,
        "open",
        failing(Path.open, errno.EOPNOTSUPP, appends),
    ),
    "cannot change the mode of a file (Operation not permitted)": (Path, "chmod", failing(Path.chmod, errno.EPERM)),
    "cannot map a file into memory (No such device)": (mmap, "mmap", failing(mmap.mmap, errno.ENODEV)),
    "cannot keep the inode number of a file": (file_system, "samestat", lambda *_: False),
    "cannot replace a file by another (Function not implemented)": (
        Path,
        "replace",
        failing(Path.replace, errno.ENOSYS),
    ),
    "cannot replace a file by another": (Path, "replace", lambda *_: None),
}


@pytest.mark.parametrize("fault", LACKING)
def test_a_file_system_without_an_operation_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    write(tmp_path / "old")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    owner, name, fake = LACKING[fault]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fake)
        for path, manifest, overwrite in ((tmp_path / "new" / "a", NEW, False), (tmp_path / "old", NEW, True)):
            with pytest.raises(ArtifactError) as refused:
                Writer.open(path, manifest, overwrite=overwrite)
            assert refused.value.cause.endswith(f") {fault}.")
            assert "artifact push" in refused.value.remedy
    assert not (tmp_path / "new").exists()
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert {file: text for file, text in after.items() if file.name != LOCK_FILE} == {
        file: text for file, text in before.items() if file.name != LOCK_FILE
    }


def test_a_process_that_gets_no_lock_keeps_the_lock_file_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS answers ENOLCK while its lock service is unreachable."""
    with Writer.open(tmp_path / "a", OLD):
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", failing(fcntl.flock, errno.ENOLCK))
            with pytest.raises(ArtifactError, match="cannot lock a file"):
                Writer.open(tmp_path / "a", OLD)
        with pytest.raises(ArtifactError, match="is writing"):
            Writer.open(tmp_path / "a", OLD)


def test_a_lock_file_that_never_stays_the_same_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_is_current", lambda *_: False)
    with pytest.raises(ArtifactError, match="cannot keep the inode number of a file"):
        Writer.open(tmp_path / "new" / "a", OLD)
    assert not (tmp_path / "new").exists()


def test_an_artifact_is_not_replaced_where_directories_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing(Path.rename, errno.EPERM, lambda path, _: path.is_dir()))
        write(tmp_path / "a")
        with pytest.raises(ArtifactError, match=r"cannot rename a directory with an open file \(Operation not perm"):
            Writer.open(tmp_path / "a", NEW, overwrite=True)
    assert text_of(tmp_path / "a") == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_is_no_unsupported_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a")
    monkeypatch.setattr(Path, "write_bytes", failing(Path.write_bytes, errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", failing(os.fsync, errno.ENOSPC))
    with Writer.open(tmp_path / "a", OLD) as writer:
        assert writer.complete
    with pytest.raises(TsdkdError, match="No space left"):
        Writer.open(tmp_path / "b", OLD)


@pytest.mark.parametrize("url", ["s3://bucket/runs/a", "gs://bucket/a", "hf://datasets/user/name"])
def test_a_url_is_no_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.chdir(tmp_path)
    for attempt in (lambda: Writer.open(Path(url), OLD), lambda: read_artifact(Path(url), "checkpoint")):
        with pytest.raises(ArtifactError) as refused:
            attempt()
        assert refused.value.cause == f"{url} is a URL, not a directory."
        assert "tsdkd artifact pull URL DIR" in refused.value.remedy
    assert not [*tmp_path.iterdir()]
    write(Path("s3:/bucket/a").absolute())  # a directory may have such a name
    assert text_of(Path("s3:/bucket/a")) == "old"


def test_a_lock_names_its_process_until_it_is_released(tmp_path: Path) -> None:
    with Writer.open(tmp_path / "a", OLD):
        assert read_holder(tmp_path / "a") == Holder.own()
        assert Holder.own().is_here
    write(tmp_path / "a")
    assert (tmp_path / "a" / LOCK_FILE).read_bytes() == b""
    (tmp_path / "a" / LOCK_FILE).write_bytes(b"\xff 2")
    assert read_holder(tmp_path / "a") is None
    assert read_holder(tmp_path / "b") is None


@pytest.mark.parametrize(
    ("kind", "options", "reached"),
    [
        ("nfs4", {"rw", "local_lock=none"}, True),
        ("nfs4", {"rw", "local_lock=flock"}, False),
        ("nfs", {"nolock"}, False),
        ("lustre", {"flock"}, True),
        ("lustre", {"localflock"}, False),
        ("cifs", set(), True),
        ("cifs", {"nobrl"}, False),
        ("fuse.juicefs", set(), True),
        ("fuse.rclone", set(), False),
        ("virtiofs", set(), False),
        ("overlay", set(), True),
    ],
)
def test_a_killed_process_of_another_host_is_known_to_have_ended_where_locks_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: set[str], reached: bool
) -> None:
    """The lock is free, and its file names a process of another host."""
    monkeypatch.setattr(file_system, "_mount", lambda _: (kind, options))
    monkeypatch.setattr(file_system.os, "major", lambda _: 0)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / LOCK_FILE).write_text(str(OTHER))
    if reached:
        write(tmp_path / "a")
    else:
        with pytest.raises(ArtifactError, match="Process 7 on gpu9 may be writing") as refused:
            Writer.open(tmp_path / "a", OLD)
        assert refused.value.remedy == f"If that process has ended, delete {tmp_path / 'a' / LOCK_FILE}."
        (tmp_path / "a" / LOCK_FILE).write_text(str(Holder(7, "the-boot-before", Holder.own().host)))
        write(tmp_path / "a")  # this host has started again


def test_a_process_in_another_container_of_this_host_has_ended_if_the_lock_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "locks_reach_other_hosts", lambda _: False)
    write(tmp_path / "a")
    (tmp_path / "a" / LOCK_FILE).write_text(str(Holder(7, Holder.own().boot, "container")))
    write(tmp_path / "a", NEW, "new", overwrite=True)


def test_hosts_without_a_boot_id_differ_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_BOOT_ID", Path("/nowhere/boot_id"))
    assert Holder.own().is_here
    assert not Holder(7, "", "gpu9").is_here


def test_the_kind_of_file_system_is_that_of_the_mount(tmp_path: Path) -> None:
    assert file_system._mount(Path("/proc/self/fd"))[0] == "proc"
    assert locks_reach_other_hosts(tmp_path)


def test_a_reader_on_another_host_is_seen_by_its_lock_on_the_manifest(tmp_path: Path) -> None:
    """Network file systems keep the lock on the directory within the host of the reader."""
    write(tmp_path / "a")
    with (tmp_path / "a" / MANIFEST_FILE).open() as manifest:
        fcntl.flock(manifest, fcntl.LOCK_SH)
        assert has_readers(tmp_path / "a")
        with pytest.raises(ArtifactError, match="is being read by another process"):
            Writer.open(tmp_path / "a", NEW, overwrite=True)
    write(tmp_path / "a", NEW, "new", overwrite=True)


def test_locks_are_taken_on_files_that_are_open_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS refuses an exclusive lock on a file that is open for reading, and has no locks on directories."""
    flock = fcntl.flock

    def flock_of_nfs(file: Any, operation: int) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        if operation & fcntl.LOCK_EX and not is_directory(descriptor) and access == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if operation & fcntl.LOCK_SH and access == os.O_WRONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock_of_nfs)
    write(tmp_path / "a")
    with locks.reading_inputs():
        read_artifact(tmp_path / "a", "checkpoint")
        assert has_readers(tmp_path / "a")
    write(tmp_path / "a", NEW, "new", overwrite=True)
    with Writer.open(tmp_path / "b", OLD):
        assert locks.is_locked(tmp_path / "b")


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("bindfs"), reason="mounts two file systems in user space")
@pytest.mark.parametrize("forwarded", [False, True])
def test_two_mounts_of_a_directory_are_as_two_hosts(tmp_path: Path, forwarded: bool) -> None:
    """Each mount keeps locks on directories to itself, as NFS does; with lock forwarding, locks on files reach both."""
    program = """
import sys; from pathlib import Path; from tests.helpers.artifacts import NEW, OLD, write
from tsdkd.artifacts.locks import reading_inputs; from tsdkd.artifacts.reader import read_artifact
from tsdkd.artifacts.writer import Writer; from tsdkd.errors import ArtifactError
def refused(path, manifest):
    try: Writer.open(path, manifest, overwrite=True).__exit__()
    except ArtifactError as error: return str(error)
    return ""
write(Path("one/a"))
with reading_inputs():
    read_artifact(Path("two/a"), "checkpoint")
    print("is being read" in refused(Path("one/a"), NEW))
with Writer.open(Path("one/b"), OLD): print("is writing" in refused(Path("two/b"), OLD))
"""
    for name in ("source", "one", "two"):
        (tmp_path / name).mkdir()
    options = "--enable-lock-forwarding --multithreaded" if forwarded else ""
    mounts = f"bindfs {options} source one && bindfs {options} source two"
    command = ["unshare", "--mount", "bash", "-c", f'{mounts} && "$@"', "-", sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(forwarded)] * 2, done.stderr
