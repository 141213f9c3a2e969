"""tsdkd generate"""

from tsdkd.cli import defaults, options
from tsdkd.cli.console import ConsoleObserver, show_next, show_pairs
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig


def require_used_models(config: GenerateConfig, student: str | None, teacher: str | None) -> None:
    """Raises InputError for a named model that does not respond: it would be neither read nor recorded."""
    for role, other, name in (("student", "teacher", student), ("teacher", "student", teacher)):
        if name and config.policy == other:
            raise InputError(
                f"The policy {other!r} does not use the {role} {name}.",
                f"Leave out --{role}, or choose another --policy, such as {role} or mixed.",
            )


@options.configured(GenerateConfig)
def command(
    config: GenerateConfig,
    run: options.Run = options.DEFAULT_RUN,
    student: options.FirstStudent = None,
    teacher: options.FirstTeacher = None,
    prompts: options.Prompts = None,
    rollouts: options.Rollouts = None,
    overwrite: options.Overwrite = False,
    seed: options.Seed = 0,
) -> None:
    """Sample responses to prompts from the student, from the teacher, or from both: prompts -> rollouts."""
    from tsdkd.stages.generate.stage import format_skipped, generate

    require_used_models(config, student, teacher)
    models = {} if config.policy == "teacher" else {"student": defaults.student(student)}
    models |= {} if config.policy == "student" else {"teacher": defaults.teacher(teacher)}
    artifact = generate(
        prompts or defaults.PROMPTS,
        next(iter(models.values())),
        rollouts or run / "rollouts",
        config,
        seed,
        ConsoleObserver(),
        overwrite,
        teacher=models.get("teacher"),
    )
    manifest, summary = artifact.manifest, artifact.manifest.summary
    skipped = format_skipped(summary["prompts_skipped"], config.max_prompt_tokens)
    per_response = summary["response_tokens"] / summary["responses"]
    teacher_fraction = summary["teacher_tokens"] / summary["response_tokens"]
    by_teacher = f", {teacher_fraction:.0%} by the teacher" if len(models) > 1 else ""
    show_pairs(
        "rollouts",
        [
            ("path", str(artifact.path)),
            *models.items(),
            ("engine", f"{manifest.engine} {manifest.libraries[manifest.engine]}"),
            ("prompts", f"{summary['prompts']:,} (skipped: {skipped})"),
            ("responses", f"{summary['responses']:,}, {summary['truncated']:,} truncated"),
            ("tokens", f"{summary['response_tokens']:,} ({per_response:.0f} a response{by_teacher})"),
        ],
    )
    show_next(f"tsdkd score{options.run_option(run)}{options.path_option('--rollouts', rollouts)}")
