"""What to know beside the numbers of a report: where things come from, what is missing, what went wrong."""

from collections.abc import Iterator

from tsdkd.artifacts.journal import Session
from tsdkd.artifacts.manifest import MADE_BY
from tsdkd.stages.metrics.health import HealthMonitor, degeneration_warning
from tsdkd.stages.report.curves import Entry
from tsdkd.stages.report.descriptions import last
from tsdkd.stages.report.runs import STAGES, Run, RunArtifact

LINEAGE = ["artifact", "fingerprint", "holds", "made from", "with"]


def lineage(run: Run) -> list[list[str]]:
    """Of `LINEAGE`, a row for each artifact."""
    return [
        [
            piece.name,
            piece.manifest.fingerprint[:12] if piece.complete else piece.manifest.state,
            _holds(piece),
            ", ".join(
                f"{parent.kind if parent.kind in MADE_BY else last(parent.path)} {parent.fingerprint[:12]}"
                for parent in piece.manifest.parents
            ),
            ", ".join(f"{model.role} {last(model.name)} {model.weights[:12]}" for model in piece.manifest.models),
        ]
        for piece in run.pieces
    ]


def missing(run: Run) -> list[str]:
    """Kinds of artifacts that the run has none of, and what makes them: those that its training needs."""
    online = any(piece.manifest.config["online"] is not None for piece in run.trained)
    needless = {"rollouts", "scores"} if online else set()
    if run.trained and all(piece.by_heart for piece in run.trained):
        needless.add("scores")
    return [
        f"{run.path} holds no {kind} yet: `tsdkd {STAGES[kind]} --run {run.path}` writes them."
        for kind in STAGES
        if kind not in needless and not run.of(kind)
    ]


def warnings(run: Run) -> list[str]:
    """What the stages warned of, how sessions failed, and what is wrong with the files now."""
    found = [f"{piece.name}: {text}" for piece in run.pieces for text in _of_piece(piece)]
    return list(dict.fromkeys(found))  # a resumed session repeats what the one before said


def degenerations(logs: dict[str, list[Entry]]) -> list[str]:
    """Where training showed a sign of collapse first, judged as it is while it runs."""
    return [f"{name}: step {step:.0f}: {sign}." for name, log in logs.items() for step, sign in _signs(log)]


def _signs(log: list[Entry]) -> Iterator[tuple[float, str]]:
    """Each once: step and words."""
    watch, said = HealthMonitor(), set[str]()
    for entry in log:
        signs = watch.see(entry) if "loss" in entry else {}
        yield from ((entry["step"], words) for sign, words in signs.items() if sign not in said)
        said |= signs.keys()


def _of_piece(piece: RunArtifact) -> list[str]:
    shown = {degeneration_warning(*sign) for sign in _signs(piece.log)}  # see degenerations
    told = [text for session in piece.sessions for text in (*session.warnings, *_failed(session)) if text not in shown]
    if "collapsed_at" in piece.manifest.summary:
        told.append(f"Training was stopped at step {piece.manifest.summary['collapsed_at']}, since it degenerated.")
    return [*told, *piece.faults]


def _failed(session: Session) -> list[str]:
    return [f"The session of {session.started} failed: {session.cause}"] if session.exit == "failed" else []


def _holds(piece: RunArtifact) -> str:
    count = len(piece.manifest.parts)
    rows = f"{piece.manifest.rows:,} rows in " if piece.manifest.rows else ""
    return f"{rows}{count} file{'' if count == 1 else 's'}"
