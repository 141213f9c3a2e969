"""tsdkd train"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsdkd.cli import defaults, options
from tsdkd.cli.console import ConsoleObserver, show_next, show_pairs
from tsdkd.cli.train_config import read_train_config, scores_path
from tsdkd.core.config import TERMS
from tsdkd.stages.config.groups import MONITORING
from tsdkd.stages.config.train import TrainConfig
from tsdkd.stages.metrics.names import HELD_OUT_METRICS, METRICS, SUMMARY_METRICS, metric

if TYPE_CHECKING:
    from tsdkd.artifacts.manifest import Manifest
    from tsdkd.artifacts.reader import Artifact


@options.configured(TrainConfig, read_train_config)
def command(
    config: TrainConfig,
    run: options.Run = options.DEFAULT_RUN,
    student: options.Student = None,
    teacher: Annotated[
        list[str] | None,
        options.model_option(
            "Teacher of online training: model directory or hub id. Several: NAME=MODEL for each, and --teacher-by.",
            "as recorded, else embedded-teacher",
        ),
    ] = None,
    teacher_url: options.TeacherUrls = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="Prompts of online training: file, hub id or directory.",
            show_default="the embedded prompts",
            rich_help_panel=options.COMMON,
        ),
    ] = None,
    rollouts: options.Rollouts = None,
    scores: options.Scores = None,
    checkpoint: options.Checkpoint = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="Log one line a minute, without a progress bar.", rich_help_panel=MONITORING),
    ] = False,
) -> None:
    """Train the student on rollouts and scores, or on prompts with a teacher: rollouts, scores -> checkpoint.

    With --prompts, --teacher or --lambda, training is online: the student responds as it learns.
    """
    from tsdkd.artifacts.reader import read_artifact
    from tsdkd.stages.data.recorded_chat import chat_of_rollouts
    from tsdkd.stages.train.hosts import failing_together
    from tsdkd.stages.train.trial import try_objective

    output, observer, chat = checkpoint or run / "checkpoint", ConsoleObserver(plain=plain), config.chat
    with failing_together():
        try_objective(config)  # the stages, which take seconds to import, try it too
        if config.online:
            data = rollouts, prompts
            artifact = _train_online(config, *data, student, teacher, teacher_url, output, seed, observer, overwrite)
        else:
            recorded, scored = rollouts or run / "rollouts", scores_path(config, scores, run)
            artifact = _train_offline(config, recorded, scored, student, output, seed, observer, overwrite)
    learned = None
    if not config.online or rollouts:
        learned = read_artifact(rollouts or run / "rollouts", "rollouts", hashed=False)
        chat = chat_of_rollouts(learned, config.chat)
    rows = _summary(config, artifact.manifest, learned.manifest if learned else None)
    show_pairs("checkpoint", [("path", str(artifact.path)), *rows])
    paths = f"{options.run_option(run)}{options.path_option('--checkpoint', checkpoint)}"
    show_next(f"tsdkd eval{paths}{options.chat_options(chat)}")


def _train_online(
    config: TrainConfig,
    rollouts: Path | None,
    prompts: Path | None,
    student: str | None,
    teacher: list[str] | None,
    teacher_url: list[str] | None,
    output: Path,
    seed: int,
    observer: ConsoleObserver,
    overwrite: bool,
) -> Artifact:
    from tsdkd.artifacts.reader import read_artifact
    from tsdkd.stages.train.stage import train_online, train_served

    assert config.online is not None
    recorded = read_artifact(rollouts, "rollouts", hashed=False).manifest if rollouts else None
    data, learner = rollouts or prompts or defaults.PROMPTS, defaults.student(student, recorded)
    more = output, config, seed, observer, overwrite
    column = config.online.sampling.teacher_by
    if teacher_url:
        column = column or defaults.recorded_teacher_by(recorded)
        urls, names = options.parse_served(teacher_url, teacher, column)
        return train_served(data, learner, urls, names, *more)
    return train_online(data, learner, defaults.teachers(teacher, column, recorded), *more)


def _train_offline(
    config: TrainConfig,
    rollouts: Path,
    scores: Path | None,
    student: str | None,
    output: Path,
    seed: int,
    observer: ConsoleObserver,
    overwrite: bool,
) -> Artifact:
    from tsdkd.artifacts.reader import read_artifact

    if scores:
        recorded = read_artifact(scores, "scores", hashed=False)
    else:
        recorded = read_artifact(rollouts, "rollouts", hashed=False)

    from tsdkd.stages.train.stage import train_offline

    name = defaults.student(student, recorded.manifest)
    return train_offline(rollouts, scores, name, output, config, seed, observer, overwrite)


def _summary(config: TrainConfig, manifest: Manifest, rollouts: Manifest | None) -> list[tuple[str, str]]:
    """`rollouts`: those with recorded responses; None without any."""
    from tsdkd.stages.data.provenance import Staleness, has_student_responses

    summary = manifest.summary
    rows = [
        ("student", manifest.model("student").name),
        *(
            (f"teacher{name and f' {name}'} ({'online' if config.online else 'absent'})", teacher.name)
            for name, teacher in manifest.teachers.items()
        ),
        ("method", _method_text(config.method, manifest.config["method"])),
        ("steps", f"{summary['steps']} of {config.batch_size} responses, {manifest.config['precision']}"),
    ]
    family = manifest.config["objective"]  # empty for a method with losses of its own
    names = [key.removesuffix("_first") for key in summary if key.endswith("_first")]
    for name in [*(name for name in SUMMARY_METRICS if name in names), *sorted({*names} - {*SUMMARY_METRICS})]:
        weight = f" (weight {family[TERMS[name]]:g})" if TERMS.get(name) in family else ""
        values = f"{summary[f'{name}_first']:.3f} -> {summary[f'{name}_last']:.3f}"
        rows.append((f"{metric(name).label}{weight}", values))
    measured = "candidate_overlap_last" in summary and rollouts is not None and has_student_responses(rollouts)
    if measured and Staleness(summary["candidate_overlap_last"], summary["drift_last"]).is_stale:
        rows.append(("scores", "stale by now: sample and score again before further training (docs/rounds.md)"))
    best = {name: summary.get(name.replace("eval_", "best_")) for name in HELD_OUT_METRICS}
    rows += [
        ("best step", f"{summary['best_step']}, {METRICS[name].label} {value:.4f}")
        for name, value in best.items()
        if value is not None
    ]
    if "degenerated_at" in summary:
        saved = summary.get("best_step", summary["steps"])
        rows.append(("degenerated", f"at step {summary['degenerated_at']}; the checkpoint is step {saved}"))
    return rows


def _method_text(given: str, name: str) -> str:
    """A method's name, with the file that was given."""
    return name if given == name else f"{name} ({given})"
