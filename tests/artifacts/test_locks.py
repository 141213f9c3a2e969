"""No run replaces an artifact that another process reads; readers neither wait for each other nor need to write."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.artifacts import EXTENDED, NEW, OLD, text_of, write
from tsdkd.artifacts import locks
from tsdkd.artifacts.files import LOCK_FILE
from tsdkd.artifacts.locks import has_readers, reading_inputs, register_input
from tsdkd.artifacts.reader import read_artifact, verify_artifact
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import ArtifactError


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    write(tmp_path / "a")
    return tmp_path / "a"


def test_an_input_is_not_replaced_until_its_stage_ends(artifact: Path) -> None:
    with reading_inputs():
        read_artifact(artifact, "checkpoint")
        with pytest.raises(ArtifactError) as caught:
            Writer.open(artifact, NEW, overwrite=True)
        assert "is an input and the output" in caught.value.cause  # of the same stage
    with reader_in_another_process(artifact):
        for attempt in (
            lambda: Writer.open(artifact, NEW, overwrite=True),
            lambda: Writer.open(artifact, EXTENDED, may_differ={"config.tasks"}),
        ):
            with pytest.raises(ArtifactError, match="is being read by another process"):
                attempt()
        assert text_of(artifact) == "old"
        with Writer.open(artifact, OLD) as writer:
            assert writer.complete  # the same command has nothing to do, whoever reads
        with reading_inputs():
            read_artifact(artifact, "checkpoint")  # a second reader
    write(artifact, NEW, "new", overwrite=True)
    assert text_of(artifact) == "new"


class reader_in_another_process:  # noqa: N801
    """A process that reads an artifact for as long as the block runs."""

    def __init__(self, path: Path) -> None:
        program = (
            "import sys\nfrom pathlib import Path\nfrom tsdkd.artifacts.locks import register_input, reading_inputs\n"
            "with reading_inputs():\n"
            "    register_input(Path(sys.argv[1]))\n    print('reads', flush=True)\n    sys.stdin.read()\n"
        )
        command = [sys.executable, "-c", program, str(path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> "reader_in_another_process":
        assert self.process.stdout is not None
        self.process.stdout.readline()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate(b"")


def test_a_complete_replacement_waits_for_new_readers(artifact: Path) -> None:
    messages: list[str] = []
    with Writer.open(artifact, NEW, overwrite=True) as writer:
        writer.temporary_path("one").write_text("new")
        writer.add_file("one")
        reader = reader_in_another_process(artifact)
        with reader:

            def notify(message: str) -> None:
                messages.append(message)
                assert text_of(artifact) == "old"
                reader.process.kill()

            writer.finish({"text": "new"}, notify)
    assert len(messages) == 1
    assert "is being read by another process" in messages[0]
    assert text_of(artifact) == "new"


def test_a_reader_locks_the_directory_that_it_finds_after_a_replacement(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact is replaced after the reader opened the directory and before it has the lock."""
    flock, replaced = locks.fcntl.flock, list[str]()

    def replace_first(file: int, operation: int) -> None:
        if not replaced:
            replaced.append("once")
            write(artifact, NEW, "new", overwrite=True)
        flock(file, operation)

    monkeypatch.setattr(locks.fcntl, "flock", replace_first)
    with reading_inputs():
        register_input(artifact)
        assert has_readers(artifact)
    assert not has_readers(artifact)


def test_reading_leaves_no_file_and_needs_no_permission_to_write(artifact: Path) -> None:
    (artifact / LOCK_FILE).unlink()
    artifact.chmod(0o555)
    try:
        with reading_inputs():
            assert read_artifact(artifact, "checkpoint").manifest.seed == 0
            assert has_readers(artifact)
            assert not (artifact / LOCK_FILE).exists()
    finally:
        artifact.chmod(0o755)


def test_reading_works_where_the_file_system_has_no_locks(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with reading_inputs():
        assert read_artifact(artifact, "checkpoint").manifest.seed == 0


def test_verifying_releases_its_lock(artifact: Path) -> None:
    verify_artifact(artifact)
    assert not has_readers(artifact)


def test_a_stage_replaces_the_input_of_an_earlier_stage_of_its_process(artifact: Path) -> None:
    with reading_inputs():
        read_artifact(artifact, "checkpoint")
    write(artifact, NEW, "new", overwrite=True)
    assert text_of(artifact) == "new"
