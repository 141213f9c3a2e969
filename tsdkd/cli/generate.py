"""tsdkd generate"""

from tsdkd.cli import defaults, options
from tsdkd.cli.console import ConsoleObserver, show_next, show_pairs
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig


def require_used_student(config: GenerateConfig, student: str | None) -> None:
    """Raises InputError for a student that does not respond: it would be neither read nor recorded."""
    if student and config.policy == "teacher":
        raise InputError(
            f"The policy 'teacher' does not use the student {student}.",
            "Leave out --student, or choose another --policy, such as student or mixed.",
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

    require_used_student(config, student)
    models = {} if config.policy == "teacher" else {"student": defaults.student(student)}
    if config.policy != "student" or teacher:  # a student that responds alone ends at the teacher's end tokens, too
        models["teacher"] = defaults.teacher(teacher)
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
    by_teacher = f", {teacher_fraction:.0%} by the teacher" if config.policy not in {"student", "teacher"} else ""
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
