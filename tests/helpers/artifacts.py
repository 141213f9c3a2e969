"""Small artifacts to write, replace and extend."""

from dataclasses import asdict, replace
from pathlib import Path

from tsdkd.artifacts.manifest import Manifest, ModelRecord
from tsdkd.artifacts.reader import Artifact, read_artifact
from tsdkd.artifacts.writer import Writer
from tsdkd.stages.config.eval import EvalConfig

OLD = Manifest(kind="checkpoint", config={"tasks": "a"}, seed=0)
NEW = replace(OLD, seed=1)
RESULTS = Manifest(
    kind="results",
    config=asdict(EvalConfig(tasks=("gsm8k",))),
    seed=0,
    models=(ModelRecord("evaluated", "models/small", "a" * 64, "t", "c"),),
)
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


def write_parts(path: Path, count: int = 5, *, seed: int = 0, size: int = 3000) -> Artifact:
    """Results of several parts that differ; the last one lies in a directory of it."""
    with Writer.open(path, replace(RESULTS, seed=seed)) as writer:
        for number in range(count):
            file = f"part-{number}.bin" if number < count - 1 else "more/last.txt"
            writer.temporary_path(file).parent.mkdir(exist_ok=True)
            writer.temporary_path(file).write_bytes(bytes([number + seed]) * (size + number))
            writer.add_file(file)
        return writer.finish({})


def text_of(path: Path) -> str:
    """The text of a complete artifact, which must be the same in its parts and its summary."""
    artifact = read_artifact(path, "checkpoint")
    text: str = artifact.manifest.summary["text"]
    assert {(path / part.file).read_text() for part in artifact.manifest.parts} <= {text, "old"}
    return text
