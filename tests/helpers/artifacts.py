"""Small artifacts to write, replace and extend."""

from dataclasses import replace
from pathlib import Path

from tsdkd.artifacts.manifest import Manifest
from tsdkd.artifacts.reader import Artifact, read_artifact
from tsdkd.artifacts.writer import Writer

OLD = Manifest(kind="checkpoint", config={"tasks": "a"}, seed=0)
NEW = replace(OLD, seed=1)
EXTENDED = replace(OLD, config={"tasks": "ab"})


def add(writer: Writer, file: str, text: str) -> None:
    if not writer.has(file):
        writer.temporary_path(file).write_text(text)
        writer.add_file(file)


def write(path: Path, manifest: Manifest = OLD, text: str = "old", *, overwrite: bool = False) -> Artifact:
    with Writer.open(path, manifest, overwrite=overwrite) as writer:
        if writer.complete:
            return writer.artifact
        add(writer, "one", text)
        return writer.finish({"text": text})


def text_of(path: Path) -> str:
    """The text of a complete artifact, which must be the same in its parts and its summary."""
    artifact = read_artifact(path, "checkpoint")
    text: str = artifact.manifest.summary["text"]
    assert {(path / part.file).read_text() for part in artifact.manifest.parts} <= {text, "old"}
    return text
