"""Training reports whether its scores are fresh: by fingerprints, else by the student's own predictions."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.training import CONFIG, RecordingObserver, learn
from tsdkd.artifacts.manifest import load_manifest
from tsdkd.stages.config.train import LoRAConfig
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.models.fingerprint import checkpoint_fingerprint
from tsdkd.stages.models.record import model_record

SHORT = replace(CONFIG, epochs=1)


@pytest.fixture(scope="module")
def trained(run: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = tmp_path_factory.mktemp("trained") / "c"
    learn(run, student, checkpoint, replace(SHORT, learning_rate=1e-2))
    return checkpoint


def test_fresh_scores_are_known_without_reading(
    run: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OfflineSource, "measure_staleness", lambda *_: pytest.fail("read"))
    observer = RecordingObserver()
    learn(run, student, tmp_path / "c", SHORT, observer=observer)
    lines = [message for message in observer.messages if "scores are" in message]
    assert len(lines) == 1
    assert "The student that is trained sampled the responses." in lines[0]
    assert "they are fresh" in lines[0]
    assert "unknown" in lines[0]  # a plain student
    assert not any("scores" in message for message in observer.warnings)


def test_a_second_training_from_old_scores_is_warned_and_runs(
    run: Path, student: Path, trained: Path, tmp_path: Path
) -> None:
    observer = RecordingObserver()
    learn(run, trained, tmp_path / "c", SHORT, observer=observer)
    (warning,) = (message for message in observer.warnings if "scores" in message)
    assert f"An earlier student, {student} (1 training before), sampled the responses." in warning
    assert "The student that is trained has candidate overlap" in warning
    assert warning.count("Sample and score again") == 1
    (met,) = (message for message in observer.messages if "start" in message)
    assert met.startswith("The student's start learned (tsdkd) from the teacher that scores, ")


def test_only_one_rank_reads(run: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsdkd.stages.train.stage.rank", lambda: 1)
    monkeypatch.setattr(OfflineSource, "measure_staleness", lambda *_: pytest.fail("read"))
    learn(run, trained, tmp_path / "c", SHORT)


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2), LoRAConfig(rank=2, merge=True)])
def test_a_manifest_tells_the_fingerprint_of_its_checkpoint(
    run: Path, student: Path, tmp_path: Path, lora: LoRAConfig | None
) -> None:
    """So a history needs no weights; an adapter's fingerprint includes its base model."""
    checkpoint = tmp_path / "c"
    learn(run, student, checkpoint, replace(SHORT, batch_size=10, micro_batch_size=10, lora=lora))
    recorded = model_record("student", str(checkpoint)).weights
    assert checkpoint_fingerprint(checkpoint, load_manifest(checkpoint)) == recorded
