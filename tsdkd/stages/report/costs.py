"""Time, work, memory and disk of each artifact, from manifests and journals."""

from collections import Counter
from dataclasses import dataclass

from tsdkd.artifacts.journal import Session
from tsdkd.stages.report.runs import Run, RunArtifact

COST_COLUMNS = ["artifact", "sessions", "time", "work", "per second", "peak memory", "peak GPU memory", "disk"]
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens or documents that a stage processed."""

    count: float
    unit: str
    approximate: bool = False

    def __str__(self) -> str:
        return f"{'about ' if self.approximate else ''}{self.count:,.0f} {self.unit}"


def cost_rows(run: Run) -> list[list[str]]:
    """A row of `COST_COLUMNS` for each artifact, and one for all."""
    rows = [_cost_row(artifact) for artifact in run.artifacts]
    seconds = sum(session.seconds or 0 for artifact in run.artifacts for session in artifact.sessions)
    disk = format_bytes(sum(artifact.bytes for artifact in run.artifacts))
    return [*rows, ["total", "", format_seconds(seconds) if seconds else UNKNOWN, "", "", "", "", disk]]


def cost_notes(run: Run) -> list[str]:
    """Sentences below the table: artifacts with unknown costs, and the machines."""
    notes = []
    if names := [artifact.name for artifact in run.artifacts if not artifact.sessions]:
        notes.append(f"No journal records time and memory of {', '.join(names)}.")
    if names := [artifact.name for artifact in run.artifacts if any(map(_has_no_time, artifact.sessions))]:
        notes.append(f"Killed and running sessions have no recorded time: {', '.join(names)}.")
    notes += [note for artifact in run.artifacts if (note := _step_note(artifact))]
    machines = dict.fromkeys(session.machine for artifact in run.artifacts for session in artifact.sessions)
    return [*notes, f"Machines: {'; '.join(machines)}."] if machines else notes


def _step_note(artifact: RunArtifact) -> str | None:
    """The mean time of a training step, and the share of each part."""
    seconds = Counter[str]()
    for step in artifact.step_times:
        seconds.update({name: value for name, value in step.items() if name != "step"})
    if not (whole := seconds.pop("whole", 0.0)):
        return None
    shares = ", ".join(f"{part} {total / whole:.0%}" for part, total in seconds.most_common())
    return f"A step of {artifact.name} takes {whole / len(artifact.step_times):.3g} s: {shares}."


def work_of(artifact: RunArtifact) -> Work | None:
    """None if nothing is recorded yet."""
    summary = artifact.manifest.summary
    if artifact.kind == "checkpoint":
        lengths = [entry["response_length"] for entry in artifact.log if "response_length" in entry]
        tokens = sum(lengths) * artifact.manifest.config["batch_size"] if lengths else 0
        return Work(tokens, "tokens", approximate=True) if lengths else None  # last batches may be smaller
    if not summary:
        return None
    if artifact.kind == "results":
        return Work(sum(result["documents"] for name, result in summary.items() if name != "held_out"), "documents")
    return Work(summary["response_tokens"], "tokens")


def format_seconds(seconds: float) -> str:
    """Such as "1 h 5 min", "5 min 3 s" or "3.2 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def format_bytes(count: float) -> str:
    """Such as "0.13 GB", "52.1 MB" or "3.0 kB"."""
    if count >= 1e8:
        return f"{count / 1e9:,.2f} GB"
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def _cost_row(artifact: RunArtifact) -> list[str]:
    sessions = artifact.sessions
    work, seconds = work_of(artifact), sum(session.seconds or 0 for session in sessions)
    all_timed = bool(sessions) and not any(map(_has_no_time, sessions))
    outcomes = [_outcome(session, artifact) for session in sessions]
    return [
        artifact.name,
        ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes)) or UNKNOWN,
        format_seconds(seconds) if seconds else UNKNOWN,
        str(work) if work else "",
        f"{work.count / seconds:,.1f}" if work and all_timed and seconds else "",
        _format_peak([session.memory for session in sessions]),
        _format_peak([session.gpu_memory for session in sessions]),
        format_bytes(artifact.bytes),
    ]


def _has_no_time(session: Session) -> bool:
    return session.seconds is None


def _outcome(session: Session, artifact: RunArtifact) -> str:
    if session.exit:
        return session.exit
    return "running" if artifact.locked and session is artifact.sessions[-1] else "killed"


def _format_peak(values: list[int | None]) -> str:
    known = [value for value in values if value is not None]
    return format_bytes(max(known)) if known else ""
