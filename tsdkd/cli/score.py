"""tsdkd score"""

from typing import Any

from tsdkd.cli import defaults, options
from tsdkd.cli.console import ConsoleObserver, show_next, show_pairs
from tsdkd.stages.config.score import ScoreConfig

MIN_ESTIMATED_BYTES = 10_000_000
"""Smaller estimates are not compared with the disk: they count values, and most bytes of small scores are metadata."""


@options.configured(ScoreConfig)
def command(
    config: ScoreConfig,
    run: options.Run = options.DEFAULT_RUN,
    student: options.Student = None,
    teacher: options.Teachers = None,
    teacher_url: options.TeacherUrls = None,
    rollouts: options.Rollouts = None,
    scores: options.Scores = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Record candidates, ranks, entropies and the teacher signal of each token: rollouts -> scores."""
    from tsdkd.artifacts.reader import read_artifact

    parent = rollouts or run / "rollouts"
    recorded = read_artifact(parent, "rollouts", hashed=False).manifest

    learner, output, observer = defaults.student(student, recorded), scores or run / "scores", ConsoleObserver()
    if teacher_url:
        column = config.teacher_by or defaults.recorded_teacher_by(recorded)
        served = options.parse_served(teacher_url, teacher, column)

        from tsdkd.stages.score.served import score_served

        artifact = score_served(parent, learner, *served, output, config, observer, overwrite)
    else:
        teachers = defaults.teachers(teacher, config.teacher_by, recorded)

        from tsdkd.stages.score.stage import score

        artifact = score(parent, learner, teachers, output, config, observer, overwrite)
    summary, size = artifact.manifest.summary, sum(part.bytes for part in artifact.manifest.parts)
    expected = summary["expected_bytes"]
    ratio = f" ({size / expected:.1%} of the estimate)" if expected >= MIN_ESTIMATED_BYTES else ""
    show_pairs(
        "scores",
        [
            ("path", str(artifact.path)),
            ("student", artifact.manifest.model("student").name),
            *((f"teacher {name}".rstrip(), record.name) for name, record in artifact.manifest.teachers.items()),
            ("response tokens", f"{summary['response_tokens']:,}"),
            ("entropy", _entropies(summary)),
            *_by_teacher(summary),
            *_served(summary),
            *_signal_errors(summary),
            ("on disk", f"{size / 1e6:,.1f} MB{ratio}"),
        ],
    )
    named = options.path_option("--rollouts", rollouts) + options.path_option("--scores", scores)
    show_next(f"tsdkd train{options.run_option(run)}{named}")


def _entropies(summary: dict[str, float]) -> str:
    return f"student {summary['student_entropy']:.2f}, teacher {summary['teacher_entropy']:.2f} nats a token"


def _by_teacher(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Responses and entropies of each teacher, where they have names."""
    return [
        (f"by {name}", f"{values['responses']:,} responses, entropy {_entropies(values)}")
        for name, values in summary.get("teachers", {}).items()
    ]


def _served(summary: dict[str, float]) -> list[tuple[str, str]]:
    """The bounds of a served teacher's entropy, and its tied candidates."""
    if "tied_candidates" not in summary:
        return []
    low, high = summary["teacher_entropy_low"], summary["teacher_entropy_high"]
    return [
        ("teacher's entropy", f"estimated, between {low:.2f} and {high:.2f} nats a token"),
        ("tied candidates", f"{summary['tied_candidates']:.2f} a token, outside the server's top K"),
    ]


def _signal_errors(summary: dict[str, float]) -> list[tuple[str, str]]:
    """The error of a teacher signal that is not exact."""
    rows = []
    if "captured_mass" in summary:
        worst = f"1 % of tokens at most {summary['captured_mass_p01']:.3f}"
        rows.append(("captured mass", f"{summary['captured_mass']:.3f}, {worst}"))
    if "divergence" in summary:
        exact, recorded = summary["divergence"], summary["signal_divergence"]
        error = f"{summary['divergence_error']:.1g} error a token"
        rows.append(("divergence", f"{exact:.5f} nats exact, {recorded:.5f} recorded, {error}"))
    return rows
