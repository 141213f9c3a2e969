"""The journal records the cost and the end of each session; it is no part of the artifact."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.runs import rollouts
from tsdkd.artifacts.files import JOURNAL_FILE
from tsdkd.artifacts.hashing import content_digest
from tsdkd.artifacts.journal import Session, read_sessions, record_session
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.artifacts.reader import read_artifact, verify_artifact
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import InputError


def test_how_sessions_end(tmp_path: Path) -> None:
    warnings = ["A first warning."]
    with pytest.raises(KeyboardInterrupt), record_session(tmp_path, "tsdkd a", []):
        raise KeyboardInterrupt
    with pytest.raises(InputError), record_session(tmp_path, "tsdkd b", []):
        raise InputError("A cause.", "A remedy.")
    with record_session(tmp_path, "tsdkd c", warnings):
        (running,) = read_sessions(tmp_path)[2:]
        assert (running.exit, running.seconds) == ("", None)
        warnings.append("A second one.")
    sessions = read_sessions(tmp_path)
    assert [(session.command, session.exit, session.cause) for session in sessions] == [
        ("tsdkd a", "interrupted", ""),
        ("tsdkd b", "failed", "A cause."),
        ("tsdkd c", "finished", ""),
    ]
    assert sessions[2].warnings == ("A first warning.", "A second one.")
    for session in sessions:
        assert (session.memory or 0) > 10**7
        assert session.seconds is not None
        assert "cores" in session.machine


def test_a_killed_session_is_listed_and_a_cut_off_line_is_skipped(tmp_path: Path) -> None:
    with record_session(tmp_path, "tsdkd a", []):
        killed = (tmp_path / JOURNAL_FILE).read_bytes()
    (tmp_path / JOURNAL_FILE).write_bytes(killed + b'{"exit": "fin')
    with record_session(tmp_path, "tsdkd b", []):
        pass
    assert [(session.command, session.exit) for session in read_sessions(tmp_path)] == [
        ("tsdkd a", ""),
        ("tsdkd b", "finished"),
    ]
    assert read_sessions(tmp_path / "nowhere") == []


def test_the_journal_counts_in_no_digest(tmp_path: Path) -> None:
    rollouts(tmp_path)
    path = tmp_path / "rollouts"
    before = content_digest(path), load_manifest(path), read_artifact(path, "rollouts").fingerprint
    with record_session(path, "tsdkd generate", []):
        pass
    assert before == (content_digest(path), verify_artifact(path)[0], read_artifact(path, "rollouts").fingerprint)
    assert JOURNAL_FILE not in [part.file for part in before[1].parts]


def test_overwrite_starts_a_new_journal_and_a_failure_before_the_first_part_leaves_none(tmp_path: Path) -> None:
    rollouts(tmp_path)
    path = tmp_path / "rollouts"
    manifest = load_manifest(path)
    with record_session(path, "tsdkd generate", []):
        pass
    with (
        Writer.open(path, manifest, overwrite=True) as writer,
        record_session(writer.path, "tsdkd generate --overwrite", []),
    ):
        writer.finish({})
    assert [(session.command, session.exit) for session in read_sessions(path)] == [
        ("tsdkd generate --overwrite", "finished")
    ]
    other, begun = tmp_path / "other", replace(manifest, state="partial", parts=())
    with pytest.raises(InputError), Writer.open(other, begun), record_session(other, "tsdkd generate", []):
        raise InputError("A cause.", "A remedy.")
    assert not other.exists()


def test_lines_are_read_as_they_are_documented(tmp_path: Path) -> None:
    start = {"command": "c", "started": "2026-01-01T00:00:00+00:00", "machine": "m", "processes": 4}
    end = {"exit": "finished", "seconds": 2.5, "memory": 7, "gpu_memory": 9, "machine": "m, H", "warnings": ["w"]}
    (tmp_path / JOURNAL_FILE).write_text("".join(json.dumps(line) + "\n" for line in (start, end)))
    assert read_sessions(tmp_path) == [
        Session("c", "2026-01-01T00:00:00+00:00", "m, H", 4, "finished", "", 2.5, 7, 9, ("w",))
    ]
