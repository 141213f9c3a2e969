"""A directory of a file system that fsspec knows: what it holds, and how artifacts get there."""

import base64
import hashlib
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.json_files import MAX_BYTES
from tsdkd.artifacts.manifest import Manifest, Part
from tsdkd.artifacts.reader import part_path
from tsdkd.errors import ArtifactError, InputError, TsdkdError, first_line
from tsdkd.stages.observer import Observer
from tsdkd.stages.share.errors import AGAIN, translate_errors
from tsdkd.stages.share.transfer import BLOCK, Source, Target, Transfer

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""The extra of tsdkd that installs the package of a protocol."""
OBJECT_STORES = {*EXTRAS, "abfs", "abfss", "az"}
"""They need no directories; making one would make a bucket."""
MAX_UPLOADS = 10_000
"""Blocks of one object of S3, at most."""
Info = dict[str, Any]


def require_plain_url(url: str) -> str:
    """Raises InputError unless `url` names one store and holds no secret. The message repeats no part of the URL."""
    split = urlsplit(url)
    if "@" in split.netloc:
        raise InputError("The URL holds a user name or a password.", "Give credentials by the environment.")
    if "?" in url:
        raise InputError("The URL holds a query (?...), which may be a key.", "Give credentials by the environment.")
    if "://" not in url or "::" in url or not (split.netloc or split.path.strip("/")):
        raise InputError(
            "This is not the URL of a directory.",
            "Name it as hf://..., s3://bucket/path, gs://bucket/path or file:///path.",
        )
    return url.rstrip("/")


class Store:
    """A directory of a file system."""

    def __init__(self, url: str, fs: AbstractFileSystem, root: str) -> None:
        self.url = url
        """The URL for messages, and to pull from later."""
        self.fs = fs
        self.root = root.rstrip("/")

    @classmethod
    def open(cls, url: str) -> "Store":
        """Raises InputError for a protocol that is unknown, or whose package is missing."""
        protocol = url.split("://", maxsplit=1)[0]
        with translate_errors(url):
            try:
                fs, root = fsspec.core.url_to_fs(url)
            except ImportError as error:
                extra = EXTRAS.get(protocol)
                install = f'`pip install "tsdkd[{extra}]"`' if extra else "the package of its file system"
                raise InputError(f"{url} cannot be opened ({first_line(error)}).", f"Install {install}.") from None
            except ValueError as error:
                raise InputError(f"{url} cannot be opened ({first_line(error)}).", "Check its protocol.") from None
        return cls(url, fs, root)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def files(self) -> dict[str, Info]:
        """What the file system knows of each file, by its name below this directory; asked anew. Links do not count."""
        with translate_errors(self.url):
            self.fs.invalidate_cache()
            found: dict[str, Info] = self.fs.find(self.root, detail=True)
        return {name[len(self.root) :].lstrip("/"): info for name, info in found.items() if info["type"] == "file"}

    @contextmanager
    def reading(self, name: str) -> Iterator[Source]:
        with translate_errors(self.url):
            stream = self.fs.open(self.path(name), "rb", block_size=BLOCK, cache_type="none")
        with closing(stream):
            yield _Translated(stream, self.url)

    def read_manifest(self) -> bytes:
        """At most one byte more than a manifest may have. Raises ArtifactError without one."""
        try:
            with self.reading(MANIFEST_FILE) as stream:
                return stream.read(MAX_BYTES + 1)
        except InputError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise ArtifactError(
                    f"{self.url} holds no finished artifact: it has no {MANIFEST_FILE}.",
                    "Check the URL; if a push was interrupted, run it again.",
                ) from error
            raise

    def holds(self, info: Info | None, part: Part, file: Path, transfer: Transfer) -> bool:
        """Whether the store holds a part of the artifact that `file` belongs to, by size and content.

        The checksum that the store computed is compared; of a store without one, the part is read back.
        """
        if info is None or info["size"] != part.bytes:
            return False
        if (same := stored_checksum_is(info, part, file)) is not None:
            return same
        with self.reading(part.file) as stream:
            return transfer.copy(stream, None, part.bytes) == part.sha256

    def require_no_links(self, names: Collection[str]) -> None:
        """Raises ArtifactError for a link below this directory, through which a push would write a file elsewhere."""
        if not isinstance(self.fs, LocalFileSystem):
            return
        root = Path(self.root).resolve()
        for name in names:
            if (root / name).resolve() != root / name:
                raise ArtifactError(
                    f"{self.path(name)} is a link or lies in a linked directory.",
                    "Remove the link, or choose another destination.",
                )

    def holds_beginning(self, info: Info, part: Part, file: Path) -> bool:
        """Whether the store holds a beginning of the part `file`, and no other bytes."""
        if info["size"] >= part.bytes:
            return False
        with self.reading(part.file) as stream, file.open("rb") as own:
            while data := stream.read(BLOCK):
                if own.read(len(data)) != data:
                    return False
        return True

    def send(
        self,
        source: Path,
        manifest: Manifest,
        parts: Collection[Part],
        stale: Collection[str],
        replaces: bool,
        observer: Observer,
    ) -> str:
        """Delete the `stale` files, send `parts` and check them, then send the manifest. Returns the URL to pull from.

        `manifest`: that of the artifact at `source`. `replaces`: whether another artifact is there.

        Without its manifest, the store holds no finished artifact.
        """
        with translate_errors(self.url):
            for name in stale:
                self.fs.rm_file(self.path(name))
        total = sum(part.bytes for part in parts)
        with observer.progress("sending", total, "bytes") as advance:
            transfer = Transfer(advance)
            for _ in transfer.each(lambda part: self._send_part(part_path(source, part), part, transfer), parts):
                pass
        content = (source / MANIFEST_FILE).read_bytes()
        with self._writing(MANIFEST_FILE, len(content)) as stream:
            stream.write(content)
        if self.read_manifest() != content:
            raise self.not_arrived(MANIFEST_FILE)
        return self.url

    def _send_part(self, file: Path, part: Part, transfer: Transfer) -> None:
        with file.open("rb") as source, self._writing(part.file, part.bytes) as stream:
            if transfer.copy(source, stream, part.bytes, block_of(part.bytes)) != part.sha256:
                raise ArtifactError(f"{file} changed while it was sent.", "Verify the artifact, and push it again.")
        with translate_errors(self.url):
            self.fs.invalidate_cache(self.path(part.file))
            info = self.fs.info(self.path(part.file))
        if not self.holds(info, part, file, transfer):
            raise self.not_arrived(part.file)

    def not_arrived(self, name: str) -> TsdkdError:
        return TsdkdError(f"{self.url} holds other bytes of {name} than were sent.", AGAIN)

    @contextmanager
    def _writing(self, name: str, size: int) -> Iterator[Target]:
        """A file of the store; after an error, a file system that can discards it."""
        path = self.path(name)
        with translate_errors(self.url):
            if OBJECT_STORES.isdisjoint([self.fs.protocol] if isinstance(self.fs.protocol, str) else self.fs.protocol):
                self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            stream = self.fs.open(path, "wb", block_size=block_of(size))
        try:
            yield _Translated(stream, self.url)
        except BaseException:
            if isinstance(stream, AbstractBufferedFile):
                stream.discard()
                stream.closed = True  # closing would keep what was written
            else:
                stream.close()
            raise
        with translate_errors(self.url):
            stream.close()


class _Translated:
    """A file whose errors name the store."""

    def __init__(self, stream: Any, url: str) -> None:
        self._stream, self._url = stream, url

    def read(self, size: int, /) -> bytes:
        with translate_errors(self._url):
            data: bytes = self._stream.read(size)
        return data

    def write(self, data: bytes, /) -> None:
        with translate_errors(self._url):
            self._stream.write(data)


def block_of(size: int) -> int:
    """Bytes of the blocks that a file of `size` bytes is sent in."""
    return max(BLOCK, -(-size // MAX_UPLOADS))


def stored_checksum_is(info: Info, part: Part, file: Path) -> bool | None:
    """Whether the checksum that a store computed is that of the part; None for a store without one, or of another kind.

    The hub keeps the SHA-256 of large files and git's SHA-1 of others, Google Cloud Storage an MD5. The ETag of S3 is
    the MD5 of an object, or of the MD5s of the blocks it was sent in; other blocks and some encryptions give others.
    """
    if info.get("lfs"):
        return bool(info["lfs"]["sha256"] == part.sha256)
    if "blob_id" in info:
        return bool(info["blob_id"] == _git_digest(file, part.bytes))
    if "md5Hash" in info:
        return base64.b64decode(info["md5Hash"]) == _md5_blocks(file, 1 << 62)[0]
    if "ETag" in info:
        return True if info["ETag"].strip('"') == _etag(file, part.bytes) else None
    return None


def _git_digest(file: Path, size: int) -> str:
    return hashlib.sha1(b"blob %d\0" % size + file.read_bytes(), usedforsecurity=False).hexdigest()


def _etag(file: Path, size: int) -> str:
    digests = _md5_blocks(file, block_of(size))
    if size < block_of(size):
        return digests[0].hex()
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


def _md5_blocks(file: Path, block: int) -> list[bytes]:
    """The MD5 of each block of a file; of an empty file, that of no bytes."""
    digests: list[bytes] = []
    with file.open("rb") as stream:
        while True:
            digest, left = hashlib.md5(usedforsecurity=False), block
            while left and (data := stream.read(min(left, 1 << 20))):
                digest.update(data)
                left -= len(data)
            if left < block or not digests:
                digests.append(digest.digest())
            if left:
                return digests
