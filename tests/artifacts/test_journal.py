"""A journal knows what each session took and how it ended, and is no part of the artifact."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.runs import rollouts
from tsdkd.artifacts.hashing import content_digest
from tsdkd.artifacts.journal import Session, read_sessions, record_session
from tsdkd.artifacts.manifest import JOURNAL_FILE, load_manifest
from tsdkd.artifacts.reader import read_artifact, verify_artifact
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import InputError


def test_how_sessions_end(tmp_path: Path) -> None:
    warnings = ["It smells."]
    with pytest.raises(KeyboardInterrupt), record_session(tmp_path, "tsdkd a", []):
        raise KeyboardInterrupt
    with pytest.raises(InputError), record_session(tmp_path, "tsdkd b", []):
        raise InputError("A cause.", "A remedy.")
    with record_session(tmp_path, "tsdkd c", warnings):
        (running,) = read_sessions(tmp_path)[2:]
        assert (running.exit, running.seconds) == ("", None)
        warnings.append("Badly.")
    found = read_sessions(tmp_path)
    assert [(one.command, one.exit, one.cause) for one in found] == [
        ("tsdkd a", "interrupted", ""),
        ("tsdkd b", "failed", "A cause."),
        ("tsdkd c", "finished", ""),
    ]
    assert found[2].warnings == ("It smells.", "Badly.")
    assert all((one.memory or 0) > 10**7 and one.seconds is not None and "cores" in one.machine for one in found)


def test_a_killed_session_is_known_and_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    with record_session(tmp_path, "tsdkd a", []):
        killed = (tmp_path / JOURNAL_FILE).read_bytes()
    (tmp_path / JOURNAL_FILE).write_bytes(killed + b'{"exit": "fin')
    with record_session(tmp_path, "tsdkd b", []):
        pass
    assert [(one.command, one.exit) for one in read_sessions(tmp_path)] == [("tsdkd a", ""), ("tsdkd b", "finished")]
    assert read_sessions(tmp_path / "nowhere") == []


def test_it_counts_in_no_digest(tmp_path: Path) -> None:
    rollouts(tmp_path)
    place = tmp_path / "rollouts"
    before = content_digest(place), load_manifest(place), read_artifact(place, "rollouts").fingerprint
    with record_session(place, "tsdkd generate", []):
        pass
    assert before == (content_digest(place), verify_artifact(place), read_artifact(place, "rollouts").fingerprint)
    assert JOURNAL_FILE not in [part.file for part in before[1].parts]


def test_replacing_an_artifact_starts_a_new_one_and_failing_at_once_leaves_none(tmp_path: Path) -> None:
    rollouts(tmp_path)
    place = tmp_path / "rollouts"
    manifest = load_manifest(place)
    with record_session(place, "tsdkd generate", []):
        pass
    with Writer.open(place, manifest, overwrite=True), record_session(place, "tsdkd generate --overwrite", []):
        assert [one.command for one in read_sessions(place)] == ["tsdkd generate --overwrite"]
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
