"""tsdkd generate"""

from typing import Annotated, Literal

import typer

from tsdkd.cli import defaults, options
from tsdkd.cli.console import Reporter, show_next, show_pairs
from tsdkd.stages.config import GenerateConfig


def command(
    run: options.Run = options.RUN,
    prompts: options.Prompts = None,
    column: options.Column = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first prompts.", rich_help_panel=options.DATA)
    ] = GenerateConfig.limit,
    rollouts: options.Rollouts = None,
    overwrite: options.Overwrite = False,
    student: options.Student = None,
    teacher: options.Teacher = None,
    policy: Annotated[
        Literal["student", "teacher"],
        typer.Option(help="Who answers: student is on-policy, teacher off-policy.", rich_help_panel=options.METHOD),
    ] = GenerateConfig.policy,
    samples_per_prompt: Annotated[
        int, typer.Option(min=1, help="Responses per prompt.", rich_help_panel=options.METHOD)
    ] = GenerateConfig.samples_per_prompt,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.", rich_help_panel=options.METHOD)
    ] = GenerateConfig.temperature,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Nucleus sampling.", rich_help_panel=options.METHOD)
    ] = GenerateConfig.top_p,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest response.", rich_help_panel=options.METHOD)
    ] = GenerateConfig.max_new_tokens,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Longer prompts are left out.", rich_help_panel=options.METHOD)
    ] = GenerateConfig.max_prompt_tokens,
    seed: options.Seed = 0,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Responses sampled at a time.", rich_help_panel=options.ENGINE)
    ] = GenerateConfig.batch_size,
    part_size: Annotated[
        int,
        typer.Option(min=1, help="Responses per file: what an interruption can cost.", rich_help_panel=options.ENGINE),
    ] = GenerateConfig.part_size,
    dtype: options.DTypeName = GenerateConfig.dtype,
) -> None:
    """Prompts -> rollouts: responses of the student (on-policy) or the teacher (off-policy)."""
    from tsdkd.stages.generate import generate

    config = GenerateConfig(
        policy=policy,
        samples_per_prompt=samples_per_prompt,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        max_prompt_tokens=max_prompt_tokens,
        limit=limit,
        column=column,
        batch_size=batch_size,
        part_size=part_size,
        dtype=dtype,
    )
    author = defaults.student(student) if policy == "student" else defaults.teacher(teacher)
    artifact = generate(
        prompts or defaults.PROMPTS, author, rollouts or run / "rollouts", config, seed, Reporter(), overwrite
    )
    found = artifact.manifest.summary
    show_pairs(
        "rollouts",
        [
            ("at", str(artifact.path)),
            (policy, author),
            ("prompts", f"{found['prompts']:,} ({found['prompts_left_out']} too long)"),
            ("responses", f"{found['responses']:,}, {found['truncated']} truncated"),
            (
                "tokens",
                f"{found['response_tokens']:,} ({found['response_tokens'] / found['responses']:.0f} a response)",
            ),
        ],
    )
    show_next(f"tsdkd score{options.at(run)}")
