"""The report's notes beside its numbers: lineage, missing artifacts, warnings and signs of degeneration."""

from collections.abc import Iterator

from tsdkd.artifacts.journal import Session
from tsdkd.artifacts.manifest import MADE_BY, Manifest
from tsdkd.stages.data.provenance import Provenance, Staleness, report_lines
from tsdkd.stages.metrics.health import HealthMonitor, degeneration_warning
from tsdkd.stages.metrics.log import is_step
from tsdkd.stages.report.curves import LogEntry
from tsdkd.stages.report.descriptions import base_name
from tsdkd.stages.report.runs import Run, RunArtifact

LINEAGE_COLUMNS = ["artifact", "fingerprint", "contents", "parents", "models"]


def lineage_rows(run: Run) -> list[list[str]]:
    """A row of `LINEAGE_COLUMNS` for each artifact."""
    return [
        [
            artifact.name,
            artifact.manifest.fingerprint[:12] if artifact.complete else artifact.manifest.state,
            _contents(artifact),
            ", ".join(
                f"{parent.kind if parent.kind in MADE_BY else base_name(parent.path)} {parent.fingerprint[:12]}"
                for parent in artifact.manifest.parents
            ),
            ", ".join(
                f"{model.role} {base_name(model.name)} {model.weights[:12]}" for model in artifact.manifest.models
            ),
        ]
        for artifact in run.artifacts
    ]


def missing_artifacts(run: Run) -> list[str]:
    """A sentence for each missing artifact that the run's training needs, with the command that writes it."""
    unneeded = set()
    if any(artifact.manifest.config["online"] is not None for artifact in run.trained):
        unneeded = {"rollouts", "scores"}
    elif run.trained and not any(artifact.uses_teacher for artifact in run.trained):
        unneeded = {"scores"}
    return [
        f"This run has no {kind} yet. Run `{command} --run {run.path}`."
        for kind, command in MADE_BY.items()
        if kind not in unneeded and not run.of_kind(kind)
    ]


def provenance_notes(run: Run) -> list[str]:
    """The provenance of the scores of each checkpoint, and how stale they were at its first and last step."""
    notes = []
    for artifact in (a for a in run.trained if a.manifest.config["online"] is None):
        rollouts, scores = (_parent(run, artifact, kind) for kind in ("rollouts", "scores"))
        if rollouts and scores:
            provenance = Provenance(artifact.manifest.model("student"), rollouts, scores)
            steps = [Staleness(e["candidate_overlap"], e["drift"]) for e in artifact.log if "drift" in e]
            met, unmet = report_lines(provenance.facts(steps[0] if steps else None))
            last = f"At the last step: {steps[-1]}." if steps else ""
            notes.append(" ".join(filter(None, [f"{artifact.name}:", met, unmet, last])))
    return notes


def _parent(run: Run, child: RunArtifact, kind: str) -> Manifest | None:
    """The manifest of the parent of this kind, if it is one of the run's artifacts."""
    fingerprints = [parent.fingerprint for parent in child.manifest.parents if parent.kind == kind]
    return next((a.manifest for a in run.of_kind(kind) if a.manifest.fingerprint in fingerprints), None)


def run_warnings(run: Run) -> list[str]:
    """The stages' warnings, failed sessions, and problems with the files."""
    warnings = [f"{artifact.name}: {text}" for artifact in run.artifacts for text in _warnings(artifact)]
    return list(dict.fromkeys(warnings))  # a resumed session repeats earlier warnings


def degeneration_signs(logs: dict[str, list[LogEntry]]) -> list[str]:
    """The first step of each sign of degeneration, by the same rules as while training."""
    return [f"{name}: step {step:.0f}: {sign}." for name, log in logs.items() for step, sign in _first_signs(log)]


def _first_signs(log: list[LogEntry]) -> Iterator[tuple[float, str]]:
    """Step and text of each sign, once."""
    monitor = HealthMonitor()
    for entry in filter(is_step, log):
        yield from ((entry["step"], sign.text) for sign in monitor.update(entry) if sign.is_new)


def _warnings(artifact: RunArtifact) -> list[str]:
    shown = {degeneration_warning(*sign) for sign in _first_signs(artifact.log)}  # by degeneration_signs
    texts = [text for session in artifact.sessions for text in (*session.warnings, *_failure(session))]
    warnings = [text for text in texts if text not in shown]
    if "degenerated_at" in artifact.manifest.summary:
        warnings.append(f"training stopped at step {artifact.manifest.summary['degenerated_at']}: it degenerated.")
    return [*warnings, *artifact.problems]


def _failure(session: Session) -> list[str]:
    return [f"the session of {session.started} failed: {session.cause}"] if session.exit == "failed" else []


def _contents(artifact: RunArtifact) -> str:
    count = len(artifact.manifest.parts)
    rows = f"{artifact.manifest.rows:,} rows in " if artifact.manifest.rows else ""
    return f"{rows}{count} part{'' if count == 1 else 's'}"
