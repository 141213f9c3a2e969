"""Tests that the file system of a directory supports the operations that artifacts need.

File systems on a network, in user space or over object storage may not support an operation, or report success without
effect. A stage then refuses the directory before it writes.
"""

import mmap
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os.path import samestat
from pathlib import Path

import psutil

from tsdkd.artifacts.disk import DISK_ERRORS, default_mode, fsync
from tsdkd.errors import ArtifactError

PROBES = (".probe-1.tmp", ".probe-2.tmp")
"""Names of temporary files, with which the operations are tried."""
_REMEDY = (
    "Choose a directory on a local disk, or on NFS, CephFS or Lustre with locks; `tsdkd artifact push` copies complete "
    "artifacts to object storage."
)
_ONE_KERNEL = {"tmpfs", "overlay", "btrfs", "zfs"}
"""Types without a device number of their own whose locks the kernel of this host keeps."""
_LOCAL_LOCKS = {
    "nfs": {"nolock", "local_lock=flock", "local_lock=all"},
    "nfs4": {"local_lock=flock", "local_lock=all"},
    "lustre": {"localflock"},
    "cifs": {"nobrl"},
    "smb3": {"nobrl"},
    "ceph": set(),
    "fuse.juicefs": set(),
}
"""Types whose servers keep locks for all hosts, with the mount options that keep them on one host."""


def require_local_path(path: Path) -> None:
    """Raises ArtifactError for a URL, from which `Path` has removed a slash."""
    scheme, *rest = path.parts or ("",)
    if rest and re.fullmatch("[a-z][a-z0-9+.-]+:", scheme) and not Path(scheme).exists():
        url = f"{scheme}//{'/'.join(rest)}"
        raise ArtifactError(
            f"{url} is a URL, not a directory.",
            "Run in a local directory; `tsdkd artifact pull URL DIR` and `push DIR URL` copy artifacts.",
        )


def require_file_operations(directory: Path) -> None:
    """Try the operations on files that artifacts need. Raises ArtifactError for the first one that fails.

    The caller has locked the directory and synced the lock file. A full disk and missing permissions raise nothing: the
    writes that follow report them.
    """
    file, other = (directory / name for name in PROBES)
    with suppress(OSError):
        for left in (file, other):
            left.unlink(missing_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))  # the mode of safetensors' files
        try:
            sync_names(directory)
            _try_files(directory, file, other)
        finally:
            file.unlink(missing_ok=True)
            other.unlink(missing_ok=True)


def sync_names(directory: Path) -> None:
    """Wait until the names in a directory are on disk. Raises ArtifactError if the file system cannot sync them."""
    with required_operation(directory, "write the names in a directory to disk"):
        fsync(directory)


def _try_files(directory: Path, file: Path, other: Path) -> None:
    with required_operation(directory, "append to a file"):
        file.write_bytes(b"a")
        with file.open("ab") as appended:
            appended.write(b"b")
        require_result(file.read_bytes() == b"ab")
    with required_operation(directory, "change the mode of a file"):
        file.chmod(default_mode())
    with (
        required_operation(directory, "map a file into memory"),
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):
        require_result(mapped[:] == b"ab")
    with required_operation(directory, "keep the inode number of a file"), file.open("rb") as opened:
        require_result(samestat(os.fstat(opened.fileno()), file.stat()))
    with required_operation(directory, "replace a file by another"):
        other.touch()
        other.replace(file)
        require_result(file.read_bytes() == b"" and not other.exists())


@contextmanager
def required_operation(directory: Path, operation: str) -> Iterator[None]:
    """Raises ArtifactError if the operation inside fails; a disk error stays an OSError."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise
        reason = f" ({error.strerror})" if error.strerror else ""
        raise file_system_error(directory, f"cannot {operation}{reason}") from None


def require_result(holds: bool) -> None:
    """Raises OSError if an operation had a wrong result; `required_operation` turns it into an ArtifactError."""
    if not holds:
        raise OSError


def file_system_error(directory: Path, fault: str) -> ArtifactError:
    """The error for a file system; `fault` is its verb and object, such as "cannot lock a file"."""
    return ArtifactError(f"The file system of {directory} ({_mount(directory)[0]}) {fault}.", _REMEDY)


def locks_reach_other_hosts(directory: Path) -> bool:
    """Whether a lock in a directory is free only if no process of any host holds it.

    True also for a file system that only this host uses; False if nothing is known about its locks.
    """
    kind, options = _mount(directory)
    if os.major(directory.stat().st_dev) or kind in _ONE_KERNEL:
        return True
    return kind in _LOCAL_LOCKS and not _LOCAL_LOCKS[kind] & options


def _mount(directory: Path) -> tuple[str, set[str]]:
    """Type and options of the mount that holds a directory."""
    mounted = {Path(mount.mountpoint): mount for mount in psutil.disk_partitions(all=True)}  # the last one hides others
    path = directory.resolve()
    found = next((mounted[parent] for parent in (path, *path.parents) if parent in mounted), None)
    return (found.fstype, set(found.opts.split(","))) if found else ("of unknown type", set())
