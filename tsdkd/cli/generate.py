"""tsdkd generate"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tsdkd.cli import defaults, options
from tsdkd.cli.console import ConsoleObserver, show_next, show_pairs
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GIVEN, GenerateConfig

if TYPE_CHECKING:
    from tsdkd.artifacts.reader import Artifact


def require_used_models(config: GenerateConfig, student: str | None, teachers: list[str] | None) -> None:
    """Raises InputError for a named model that has no effect: it would be neither read nor recorded."""
    for role, policy, names in (("student", "teacher", student and [student]), ("teacher", GIVEN, teachers)):
        if names and config.policy == policy:
            elsewhere = " and give it to tsdkd score" if policy == GIVEN else ""
            raise InputError(
                f"The policy {policy!r} does not use the {role} {names[0]}.",
                f"Leave out --{role}{elsewhere}, or choose another --policy, such as student or mixed.",
            )


@options.configured(GenerateConfig)
def command(
    config: GenerateConfig,
    run: options.Run = options.DEFAULT_RUN,
    student: options.FirstStudent = None,
    teacher: options.FirstTeachers = None,
    prompts: options.Prompts = None,
    rollouts: options.Rollouts = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
) -> None:
    """Sample responses to prompts from the student, from the teacher, or from both: prompts -> rollouts.

    With --policy given, the rows hold the responses, such as conversations: nothing is sampled.
    """
    from tsdkd.stages.generate.stage import generate

    require_used_models(config, student, teacher)
    needs_teacher = config.policy not in {"student", GIVEN}
    artifact = generate(
        prompts or defaults.PROMPTS,
        None if config.policy == "teacher" else defaults.student(student),
        rollouts or run / "rollouts",
        config,
        seed,
        ConsoleObserver(),
        overwrite,
        # a student also ends at a named teacher's end tokens
        teachers=defaults.teachers(teacher, config.teacher_by) if needs_teacher or teacher else {},
    )
    rows = _given_rows(artifact, config) if config.policy == GIVEN else _sampled_rows(artifact, config)
    models = [(model.role.replace(":", " ", 1), model.name) for model in artifact.manifest.models]
    show_pairs("rollouts", [("path", str(artifact.path)), *models, *rows])
    named = f"{options.run_option(run)}{options.path_option('--rollouts', rollouts)}"
    if teacher and config.policy == "teacher":
        named += " --student MODEL"
    if config.teacher_by and not artifact.manifest.teachers:
        named += " --teacher NAME=MODEL ..."
    show_next(f"tsdkd score{named}")


def _sampled_rows(artifact: Artifact, config: GenerateConfig) -> list[tuple[str, str]]:
    from tsdkd.stages.generate.stage import format_skipped

    manifest, summary = artifact.manifest, artifact.manifest.summary
    skipped = format_skipped(summary["prompts_skipped"], config.max_prompt_tokens)
    per_response = summary["response_tokens"] / summary["responses"]
    teacher_fraction = summary["teacher_tokens"] / summary["response_tokens"]
    by_teacher = f", {teacher_fraction:.0%} by the teacher" if config.policy not in {"student", "teacher"} else ""
    return [
        ("engine", f"{manifest.engine} {manifest.libraries[manifest.engine]}"),
        ("prompts", f"{summary['prompts']:,} (skipped: {skipped})"),
        ("responses", f"{summary['responses']:,}, {summary['truncated']:,} truncated"),
        ("tokens", f"{summary['response_tokens']:,} ({per_response:.0f} a response{by_teacher})"),
    ]


def _given_rows(artifact: Artifact, config: GenerateConfig) -> list[tuple[str, str]]:
    from tsdkd.stages.generate.given import SKIPPED, SKIPPED_TURNS, format_counts

    summary = artifact.manifest.summary
    skipped = format_counts(summary["prompts_skipped"], SKIPPED, config)
    skipped_turns = format_counts(summary["turns_skipped"], SKIPPED_TURNS, config)
    split, per_turn = summary["split_conversations"], summary["response_tokens"] / summary["turns"]
    learned = f"{summary['response_tokens']:,} learned ({per_turn:.0f} a turn)"
    return [
        ("conversations", f"{summary['prompts']:,} (skipped: {skipped})"),
        ("responses", f"{summary['responses']:,}, {summary['truncated']:,} without an end token"),
        ("turns", f"{summary['turns']:,} (skipped: {skipped_turns})"),
        *([("split", f"{split:,} conversations, into a response for each turn")] if split else []),
        ("tokens", f"{learned}, {summary['context_tokens']:,} of context between turns"),
    ]
