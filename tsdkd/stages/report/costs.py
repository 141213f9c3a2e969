"""What a run cost: tokens, time, memory and disk, from manifests and journals."""

from dataclasses import dataclass

from tsdkd.artifacts.journal import Session
from tsdkd.stages.report.runs import Run, RunArtifact

COLUMNS = ["artifact", "sessions", "time", "work", "per second", "memory", "GPU memory", "on disk"]
UNKNOWN = "not known"


@dataclass(frozen=True, slots=True)
class Work:
    """What a stage did, in units of its own; `about` where the last batches may have been smaller."""

    count: float
    unit: str
    about: bool = False

    def __str__(self) -> str:
        return f"{'about ' if self.about else ''}{self.count:,.0f} {self.unit}"


def rows(run: Run) -> list[list[str]]:
    """Of `COLUMNS`, a row for each artifact and one for all."""
    found = [_row(piece) for piece in run.pieces]
    seconds = sum(session.seconds or 0 for piece in run.pieces for session in piece.sessions)
    size = in_bytes(sum(piece.bytes for piece in run.pieces))
    return [*found, ["in all", "", in_time(seconds) if seconds else UNKNOWN, "", "", "", "", size]]


def notes(run: Run) -> list[str]:
    """What the table cannot say."""
    found = []
    if blank := [piece.name for piece in run.pieces if not piece.sessions]:
        found.append(f"No journal, so time and memory are not known: {', '.join(blank)}.")
    if killed := [piece.name for piece in run.pieces if any(map(_unknown, piece.sessions))]:
        found.append(f"Sessions that were killed, or are still at work, count with no time: {', '.join(killed)}.")
    machines = dict.fromkeys(session.machine for piece in run.pieces for session in piece.sessions)
    return [*found, f"Made on: {'; '.join(machines)}."] if machines else found


def work(piece: RunArtifact) -> Work | None:
    """None where nothing is known yet."""
    found = piece.manifest.summary
    if piece.kind == "checkpoint":
        lengths = [entry["response_length"] for entry in piece.log if "response_length" in entry]
        return Work(sum(lengths) * piece.manifest.config["batch_size"], "tokens", about=True) if lengths else None
    if not found:
        return None
    if piece.kind == "results":
        return Work(sum(one["documents"] for name, one in found.items() if name != "held_out"), "documents")
    return Work(found["response_tokens" if piece.kind == "rollouts" else "tokens"], "tokens")


def in_time(seconds: float) -> str:
    """Such as "1 h 5 min", "5 min 3 s" or "3.2 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes, left = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s"


def in_bytes(count: float) -> str:
    """Such as "0.13 GB", "52.1 MB" or "3.0 kB"."""
    if count >= 1e8:
        return f"{count / 1e9:,.2f} GB"
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def _row(piece: RunArtifact) -> list[str]:
    done, seconds = work(piece), sum(session.seconds or 0 for session in piece.sessions)
    timed = bool(piece.sessions) and not any(map(_unknown, piece.sessions))
    ends = [_ended(session, piece) for session in piece.sessions]
    return [
        piece.name,
        ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends)) or UNKNOWN,
        in_time(seconds) if seconds else UNKNOWN,
        str(done) if done else "",
        f"{done.count / seconds:,.1f}" if done and timed and seconds else "",
        _most([session.memory for session in piece.sessions]),
        _most([session.gpu_memory for session in piece.sessions]),
        in_bytes(piece.bytes),
    ]


def _unknown(session: Session) -> bool:
    return session.seconds is None


def _ended(session: Session, piece: RunArtifact) -> str:
    if session.exit:
        return session.exit
    return "at work" if piece.busy and session is piece.sessions[-1] else "killed"


def _most(values: list[int | None]) -> str:
    known = [value for value in values if value is not None]
    return in_bytes(max(known)) if known else ""
