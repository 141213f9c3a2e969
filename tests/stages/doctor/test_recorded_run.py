"""diagnose_run: the provenance of a run's rollouts and scores, and how stale they are."""

import shutil
from pathlib import Path

import pytest

from tests.helpers.scored_runs import scored_run
from tsdkd.errors import InputError
from tsdkd.stages.config.doctor import DoctorConfig
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.doctor.findings import Finding
from tsdkd.stages.doctor.recorded_run import diagnose_run


def findings(run: Path, student: Path | None = None) -> dict[str, Finding]:
    return {f.name: f for f in diagnose_run(run, student and str(student), DoctorConfig()).all}


def test_a_fresh_run_is_not_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OfflineSource, "measure_staleness", lambda *_: pytest.fail("read"))
    found = findings(run)
    assert {name: f.status for name, f in found.items()} == {
        "sampler": "ok",
        "staleness": "ok",
        "start_teacher": "look",
    }
    assert "unknown" in found["start_teacher"].reason
    assert "Make sure" in found["start_teacher"].remedy


def test_another_student_is_measured(run: Path, teacher: Path) -> None:
    found = findings(run, teacher)
    assert (found["sampler"].status, found["staleness"].status) == ("look", "look")
    assert found["staleness"].values["candidate_overlap"] < 0.85
    assert "Sample and score again" in found["staleness"].remedy


def test_what_cannot_be_read_stops(run: Path, other_family: Path, student: Path, teacher: Path, tmp_path: Path) -> None:
    missing = findings(tmp_path)
    assert (list(missing), missing["run"].status) == (["run"], "stop")
    assert missing["run"].remedy.endswith("with --run.")
    other = findings(run, other_family)
    assert (list(other), other["student"].status) == (["student"], "stop")
    gone = shutil.copytree(student, tmp_path / "gone")
    recorded = scored_run(tmp_path, gone, teacher)
    shutil.rmtree(gone)
    assert findings(recorded)["student"].status == "stop"


def test_a_student_that_cannot_be_loaded_leaves_the_facts_of_the_manifests(
    run: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tsdkd.stages.doctor.recorded_run.load_model", lambda *_, **__: _refuse())
    found = findings(run, teacher)
    assert (found["staleness"].status, found["staleness"].reason) == ("stop", "No.")
    assert found["sampler"].status == "look"


def _refuse() -> None:
    raise InputError("No.", "Yes.")
