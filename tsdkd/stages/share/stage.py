"""push and pull: an artifact is copied as it is, part by part; every part is hashed on both sides.

A push sends the manifest last, and a pull completes the artifact last, so an interrupted copy is never taken for an
artifact. The same command continues it.
"""

import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from tsdkd.artifacts.disk import replace_text
from tsdkd.artifacts.files import MANIFEST_FILE
from tsdkd.artifacts.json_files import parse_json, unreadable_error
from tsdkd.artifacts.locks import reading_inputs
from tsdkd.artifacts.manifest import Manifest, Part, check_manifest, load_manifest, require_own_hash
from tsdkd.artifacts.reader import Artifact, check_parts, part_path, read_artifact
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import ArtifactError, InputError
from tsdkd.stages.observer import Observer, SilentObserver
from tsdkd.stages.share.hub import HubStore
from tsdkd.stages.share.store import Info, Store, require_plain_url
from tsdkd.stages.share.transfer import Transfer


@reading_inputs()
def push(source: Path, destination: str, observer: Observer | None = None, overwrite: bool = False) -> str:
    """Send a complete artifact to a directory of a file system or of the hub. Returns the URL to pull it from.

    Parts that the destination holds are not sent again. `overwrite` replaces another artifact there, and files with the
    names of parts.

    Raises ArtifactError for an artifact that is partial or changed, and for such files at the destination;
    InputError for a destination that cannot be reached; TsdkdError if other bytes arrive than were sent.
    """
    observer = observer or SilentObserver()
    url = require_plain_url(destination)
    manifest = load_manifest(source)
    read_artifact(source, manifest.kind, hashed=False)
    require_own_hash(parse_json((source / MANIFEST_FILE).read_bytes(), dict[str, Any]), source)
    _verify(source, manifest, observer)
    store = HubStore.to_write(url, manifest.kind, observer) if url.startswith("hf://") else Store.open(url)
    found = store.files()
    older = _manifest_at(store, found, source, overwrite)
    replaces = older is not None and older.fingerprint != manifest.fingerprint
    if older and replaces and not overwrite:
        raise ArtifactError(
            f"{store.url} holds other {older.kind} ({older.fingerprint[:12]}) than {source} "
            f"({manifest.fingerprint[:12]}).",
            "Choose another destination, or replace it with --overwrite.",
        )
    store.require_no_links([MANIFEST_FILE, *(part.file for part in manifest.parts)])
    missing = _missing_parts(store, found, source, manifest, observer)
    if older == manifest and not missing:
        observer.info(f"{store.url} holds this artifact: nothing to do.")
        return store.url
    if older is None and not overwrite:
        _require_own_files(store, found, source, missing)
    kept = {part.file for part in manifest.parts if part not in missing}
    stale = [part.file for part in (older.parts if older else ()) if part.file not in kept and part.file in found]
    stale += [MANIFEST_FILE] if MANIFEST_FILE in found else []
    return store.send(source, manifest, missing, stale, replaces, observer)


def _verify(source: Path, manifest: Manifest, observer: Observer) -> None:
    """Raises ArtifactError for a part that differs from the manifest."""
    total = sum(part.bytes for part in manifest.parts)
    with observer.progress("verifying", total, "bytes") as advance:
        parts = Transfer().each(lambda part: _check_part(source, manifest, part), manifest.parts)
        for part in parts:
            advance(part.bytes)


def _check_part(source: Path, manifest: Manifest, part: Part) -> Part:
    check_parts(source, replace(manifest, parts=(part,)))
    return part


def _manifest_at(store: Store, found: Collection[str], source: Path, overwrite: bool) -> Manifest | None:
    """The manifest of the artifact at a store; None without a readable one that may be replaced.

    It may if `overwrite` is set, or if it is the beginning of that at `source`, from a push that was killed.
    """
    if MANIFEST_FILE not in found:
        return None
    content = store.read_manifest()
    try:
        return _parse(content, store.url)
    except ArtifactError as error:
        if overwrite or (source / MANIFEST_FILE).read_bytes().startswith(content):
            return None
        raise ArtifactError(error.cause, "Choose another destination, or replace it with --overwrite.") from None


def _missing_parts(
    store: Store, found: dict[str, Info], source: Path, manifest: Manifest, observer: Observer
) -> list[Part]:
    """The parts that a store does not hold; those of the right size are compared by their content."""
    present = [part for part in manifest.parts if found.get(part.file, {}).get("size") == part.bytes]
    if not present:
        return list(manifest.parts)
    transfer, held = Transfer(), set[str]()

    def compare(part: Part) -> tuple[Part, bool]:
        return part, store.holds(found[part.file], part, part_path(source, part), transfer)

    with observer.progress("comparing", sum(part.bytes for part in present), "bytes") as advance:
        for part, same in transfer.each(compare, present):
            held |= {part.file} if same else set()
            advance(part.bytes)
    return [part for part in manifest.parts if part.file not in held]


def _require_own_files(store: Store, found: dict[str, Info], source: Path, missing: Collection[Part]) -> None:
    """Raises ArtifactError for a file that a part would replace; a killed push may leave the beginning of the part."""
    for part in missing:
        if part.file in found and not store.holds_beginning(found[part.file], part, part_path(source, part)):
            raise ArtifactError(
                f"{store.url} holds another {part.file}, and no finished artifact.",
                "Choose another destination, or replace files that have the names of parts with --overwrite.",
            )


def pull(source: str, output: Path, observer: Observer | None = None, overwrite: bool = False) -> Artifact:
    """Fetch an artifact from a directory of a file system or of the hub, where the newest commit of the URL is read.

    Its manifest keeps its bytes. Only files that the manifest lists are read, and only below `output` is written. An
    interrupted pull continues. `overwrite` replaces another artifact at `output` when the pulled one is complete.

    Raises ArtifactError for a source that holds no complete artifact or other files than its manifest lists, and for
    another artifact at `output`; InputError for a source that cannot be reached.
    """
    observer = observer or SilentObserver()
    url = require_plain_url(source)
    store = HubStore.to_read(url) if url.startswith("hf://") else Store.open(url)
    content = store.read_manifest()
    manifest = _parse(content, store.url)
    _require_parts(store, manifest)
    if store.url != url:
        observer.info(f"Pulling {store.url}")
    if existing := _same_at(output, manifest):
        observer.info(f"{output} holds this artifact: nothing to do.")
        _keep_bytes(existing, content)
        return existing
    wanted = replace(manifest, state="partial", parts=(), summary={})
    with Writer.open(output, wanted, overwrite=overwrite) as writer, observer.writing(writer.path):
        others = [part for part in writer.manifest.parts if part not in manifest.parts]
        missing = [part for part in manifest.parts if part not in writer.manifest.parts]
        if (others and not overwrite) or (writer.complete and (others or missing)):
            raise ArtifactError(
                f"{output} holds {manifest.kind} of the same configuration, with other content than {store.url}.",
                "Choose another directory, or replace it with --overwrite.",
            )
        writer.remove(others)
        _require_space(writer.path, sum(part.bytes for part in missing))
        _fetch(store, writer, missing, observer)
        artifact = writer.finish(manifest.summary, observer.info)
        _keep_bytes(artifact, content)
    return Artifact(output, manifest)


def _parse(content: bytes, url: str) -> Manifest:
    """The checked manifest of a complete artifact elsewhere. Raises ArtifactError."""
    try:
        raw = parse_json(content, dict[str, Any])
    except ValueError as error:
        raise unreadable_error(f"{url}/{MANIFEST_FILE}", error, "Push the artifact again.") from None
    manifest = check_manifest(raw, url)
    require_own_hash(raw, url)
    if manifest.state != "complete":
        raise ArtifactError(f"{url} is not finished.", "Complete it, and push it again.")
    return manifest


def _require_parts(store: Store, manifest: Manifest) -> None:
    """Raises ArtifactError if a store lacks a part, or holds one of another size."""
    files = store.files()
    for part in manifest.parts:
        size = files.get(part.file, {}).get("size")
        if size != part.bytes:
            found = "is missing" if size is None else f"has {size:,} bytes, not {part.bytes:,}"
            raise ArtifactError(
                f"{part.file} {found} at {store.url}.", "Push the artifact again, or name another revision of it."
            )


def _same_at(output: Path, manifest: Manifest) -> Artifact | None:
    """The artifact at `output` if it is complete, unchanged and the same."""
    if not (output / MANIFEST_FILE).is_file():
        return None
    try:
        existing = load_manifest(output)
        same = existing.state == "complete" and existing.fingerprint == manifest.fingerprint
        return read_artifact(output, manifest.kind) if same else None
    except ArtifactError:  # Writer.open says why, or replaces it
        return None


def _require_space(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if size > free:
        raise InputError(
            f"The artifact needs {size / 1e9:,.1f} GB more, and the disk of {directory} has {free / 1e9:,.1f} GB free.",
            "Free space, or choose another directory.",
        )


def _fetch(store: Store, writer: Writer, parts: Collection[Part], observer: Observer) -> None:
    with observer.progress("fetching", sum(part.bytes for part in parts), "bytes") as advance:
        transfer = Transfer(advance)

        def fetch(part: Part) -> Part:
            temporary = writer.temporary_path(part.file)
            temporary.parent.mkdir(parents=True, exist_ok=True)
            with store.reading(part.file) as stream, temporary.open("wb") as file:
                digest = transfer.copy(stream, file, part.bytes)
            if digest != part.sha256:
                temporary.unlink()
                raise ArtifactError(
                    f"{part.file} at {store.url} has a hash that differs from the manifest.",
                    "Push the artifact again, or name another revision of it.",
                )
            return part

        for part in transfer.each(fetch, parts):
            writer.add_file(part.file, part.rows, part.sha256)


def _keep_bytes(artifact: Artifact, content: bytes) -> None:
    """Give the manifest of a pulled artifact the bytes that it has elsewhere: a later tsdkd may record more."""
    file = artifact.path / MANIFEST_FILE
    if file.read_bytes() != content:
        replace_text(file, content.decode())
