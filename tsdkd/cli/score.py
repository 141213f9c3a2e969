"""tsdkd score"""

from tsdkd.cli import defaults, options
from tsdkd.cli.console import ConsoleObserver, show_next, show_pairs
from tsdkd.stages.config.score import ScoreConfig

ESTIMATED_BYTES = 10_000_000
"""The smallest estimate that is compared with the disk. It counts values; of small scores, most bytes are metadata."""


@options.configured(ScoreConfig)
def command(
    config: ScoreConfig,
    run: options.Run = options.DEFAULT_RUN,
    student: options.Student = None,
    teacher: options.Teacher = None,
    teacher_url: options.TeacherUrl = None,
    rollouts: options.Rollouts = None,
    scores: options.Scores = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Record candidates, ranks, entropies and the teacher signal of each token: rollouts -> scores."""
    from tsdkd.artifacts.reader import read_artifact

    parent = rollouts or run / "rollouts"
    recorded = read_artifact(parent, "rollouts", hashed=False).manifest

    learner, output, observer = defaults.student(student, recorded), scores or run / "scores", ConsoleObserver()
    if teacher_url is not None:
        from tsdkd.stages.score.served import score_served

        artifact = score_served(parent, learner, teacher_url, teacher, output, config, observer, overwrite)
    else:
        from tsdkd.stages.score.stage import score

        artifact = score(parent, learner, defaults.teacher(teacher, recorded), output, config, observer, overwrite)
    models = [artifact.manifest.model(role).name for role in ("student", "teacher")]
    summary, size = artifact.manifest.summary, sum(part.bytes for part in artifact.manifest.parts)
    expected = summary["expected_bytes"]
    ratio = f" ({size / expected:.1%} of the estimate)" if expected >= ESTIMATED_BYTES else ""
    entropies = f"student {summary['student_entropy']:.2f}, teacher {summary['teacher_entropy']:.2f} nats a token"
    show_pairs(
        "scores",
        [
            ("path", str(artifact.path)),
            ("student", models[0]),
            ("teacher", models[1]),
            ("response tokens", f"{summary['response_tokens']:,}"),
            ("entropy", entropies),
            *_served(summary),
            *_signal_errors(summary),
            ("on disk", f"{size / 1e6:,.1f} MB{ratio}"),
        ],
    )
    named = options.path_option("--rollouts", rollouts) + options.path_option("--scores", scores)
    show_next(f"tsdkd train{options.run_option(run)}{named}")


def _served(summary: dict[str, float]) -> list[tuple[str, str]]:
    """What is not exact about a served teacher."""
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
