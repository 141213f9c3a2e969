"""Findings about recorded rollouts and scores: their provenance, and how stale they are for a student."""

from dataclasses import asdict, replace
from pathlib import Path

from tsdkd.artifacts.locks import reading_inputs
from tsdkd.artifacts.manifest import ModelRecord
from tsdkd.artifacts.reader import read_artifact
from tsdkd.stages.config.doctor import DoctorConfig
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.data.provenance import Provenance, Staleness
from tsdkd.stages.data.recorded_chat import chat_of_rollouts
from tsdkd.stages.doctor.findings import Finding, Findings
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.record import model_record, require_same_tokenizer
from tsdkd.stages.models.spec import load_spec
from tsdkd.stages.observer import Observer, SilentObserver


@reading_inputs()
def diagnose_run(run: Path, student: str | None, config: DoctorConfig, observer: Observer | None = None) -> Findings:
    """The findings about a run's rollouts and scores. `student`: to be trained; None is the one that was scored.

    The student is loaded only if its weights are not those of the scored student.
    """
    findings, observer = Findings(), observer or SilentObserver()
    source = findings.attempt("run", lambda: _read_run(run))
    record = source and findings.attempt("student", lambda: _student_record(source, student, config))
    if not (source and record):
        return findings
    provenance, staleness = Provenance(record, source.rollouts.manifest, source.scores.manifest), None
    if not provenance.has_same_weights:
        staleness = findings.attempt("staleness", lambda: _measure(source, record.name, config, observer))
    values = {"staleness": asdict(staleness)} if staleness else {}
    refused = {finding.name for finding in findings.stops}
    findings.all += [
        Finding(fact.name, "ok" if fact.status == "ok" else "look", fact.text, fact.remedy, values.get(fact.name, {}))
        for fact in provenance.facts(staleness)
        if fact.name not in refused
    ]
    return findings


def _read_run(run: Path) -> OfflineSource:
    """Raises ArtifactError without rollouts and their scores."""
    read_artifact(run / "rollouts", "rollouts", "--run", hashed=False)
    read_artifact(run / "scores", "scores", "--run", hashed=False)
    return OfflineSource(run / "rollouts", run / "scores")


def _student_record(source: OfflineSource, name: str | None, config: DoctorConfig) -> ModelRecord:
    """Raises InputError for a model that cannot be read, or that has another tokenizer."""
    scored = source.scores.manifest.model("student")
    record = model_record("student", name or scored.name, chat=chat_of_rollouts(source.rollouts, config.chat))
    require_same_tokenizer(record, scored)
    return record


def _measure(source: OfflineSource, name: str, config: DoctorConfig, observer: Observer) -> Staleness:
    """Raises InputError for a model that cannot be loaded, or that does not know all ids of the scores."""
    student = load_model(name, config.sampling.dtype, attention=config.sampling.attention, observer=observer)
    return source.measure_staleness(replace(student, shared_vocab=source.shared_vocab(load_spec(name))))
