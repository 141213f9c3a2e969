"""tsdkd score"""

from typing import Annotated, Literal

import typer

from tsdkd.cli import defaults, options
from tsdkd.cli.console import ConsoleObserver, show_next, show_pairs
from tsdkd.stages.config.score import ScoreConfig


def command(
    context: typer.Context,
    run: options.Run = options.RUN,
    rollouts: options.Rollouts = None,
    scores: options.Scores = None,
    overwrite: options.Overwrite = False,
    student: options.Student = None,
    teacher: options.Teacher = None,
    signal: Annotated[
        Literal["hidden", "hidden8", "topk", "ranks"],
        options.choice(
            "hidden: exact, large; hidden8: half of it, int8; topk: small, a lower bound; ranks: no direct term.",
            options.METHOD,
        ),
    ] = ScoreConfig.signal,
    k: Annotated[int, options.count("Candidates the student proposes.", options.METHOD, least=2)] = ScoreConfig.k,
    top_k: Annotated[int, options.count("Teacher's tokens kept with topk.", options.METHOD)] = ScoreConfig.top_k,
    batch_tokens: Annotated[int, options.count("Tokens per forward.", options.ENGINE)] = ScoreConfig.batch_tokens,
    dtype: options.DTypeName = ScoreConfig.dtype,
    device_map: Annotated[
        Literal["one", "auto"],
        options.choice("auto: spread each model over all GPUs (one process).", options.ENGINE),
    ] = ScoreConfig.device_map,
) -> None:
    """Rollouts -> scores: the student's candidates, the teacher's ranks, both entropies, the teacher's distribution."""
    from tsdkd.artifacts.reader import read_artifact

    place = rollouts or run / "rollouts"
    parent = read_artifact(place, "rollouts", hashed=False).manifest

    from tsdkd.stages.score.stage import score

    config = options.configured(ScoreConfig, context)
    names = defaults.student(student, parent), defaults.teacher(teacher, parent)
    artifact = score(place, *names, scores or run / "scores", config, ConsoleObserver(), overwrite)
    found = artifact.manifest.summary
    written = sum(part.bytes for part in artifact.manifest.parts)
    show_pairs(
        "scores",
        [
            ("at", str(artifact.path)),
            ("student", names[0]),
            ("teacher", names[1]),
            ("response tokens", f"{found['tokens']:,}; {found['padding']:.1%} of what was read is padding"),
            ("entropy", f"student {found['student_entropy']:.2f}, teacher {found['teacher_entropy']:.2f} nats a token"),
            *_losses(found),
            ("on disk", f"{written / 1e6:,.1f} MB ({written / found['expected_bytes']:.1%} of what was expected)"),
        ],
    )
    named = options.named("--rollouts", rollouts) + options.named("--scores", scores)
    show_next(f"tsdkd train{options.at(run)}{named}")


def _losses(found: dict[str, float]) -> list[tuple[str, str]]:
    """What a signal that is not exact costs."""
    rows = []
    if "captured_mass" in found:
        worst = f"{found['captured_mass_worst']:.3f} at the worst 1 % of tokens"
        rows.append(("captured mass", f"{found['captured_mass']:.3f}, {worst}"))
    if "divergence" in found:
        exact, recorded = found["divergence"], found["recorded_divergence"]
        rows.append(
            (
                "divergence",
                f"{exact:.5f} nats, recorded {recorded:.5f}; a token's error is {found['divergence_error']:.1g}",
            )
        )
    return rows
