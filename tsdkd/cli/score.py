"""tsdkd score"""

from typing import Annotated, Literal

from tsdkd.cli import defaults, options
from tsdkd.cli.console import Reporter, show_next, show_pairs
from tsdkd.stages.config import ScoreConfig


def command(
    run: options.Run = options.RUN,
    rollouts: options.Rollouts = None,
    scores: options.Scores = None,
    overwrite: options.Overwrite = False,
    student: options.Student = None,
    teacher: options.Teacher = None,
    signal: Annotated[
        Literal["hidden", "topk", "ranks"],
        options.choice("hidden: exact, large; topk: small, a lower bound; ranks: no direct term.", options.METHOD),
    ] = ScoreConfig.signal,
    k: Annotated[int, options.count("Candidates the student proposes.", options.METHOD, least=2)] = ScoreConfig.k,
    top_k: Annotated[int, options.count("Teacher's tokens kept with topk.", options.METHOD)] = ScoreConfig.top_k,
    batch_tokens: Annotated[int, options.count("Tokens per forward.", options.ENGINE)] = ScoreConfig.batch_tokens,
    dtype: options.DTypeName = ScoreConfig.dtype,
) -> None:
    """Rollouts -> scores: the student's candidates, the teacher's ranks, both entropies, the teacher's distribution."""
    from tsdkd.artifacts import read

    place = rollouts or run / "rollouts"
    parent = read(place, "rollouts", hashed=False).manifest

    from tsdkd.stages.score import score

    config = ScoreConfig(signal=signal, k=k, top_k=top_k, batch_tokens=batch_tokens, dtype=dtype)
    names = defaults.student(student, parent), defaults.teacher(teacher, parent)
    artifact = score(place, *names, scores or run / "scores", config, Reporter(), overwrite)
    found = artifact.manifest.summary
    mass = [("captured mass", f"{found['captured_mass']:.3f}")] if "captured_mass" in found else []
    show_pairs(
        "scores",
        [
            ("at", str(artifact.path)),
            ("student", names[0]),
            ("teacher", names[1]),
            ("response tokens", f"{found['tokens']:,}"),
            ("entropy", f"student {found['student_entropy']:.2f}, teacher {found['teacher_entropy']:.2f} nats a token"),
            *mass,
            ("on disk", f"{sum(part.bytes for part in artifact.manifest.parts) / 1e6:,.0f} MB"),
        ],
    )
    named = options.named("--rollouts", rollouts) + options.named("--scores", scores)
    show_next(f"tsdkd train{options.at(run)}{named}")
