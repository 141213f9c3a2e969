"""tsdkd generate"""

from typing import Annotated, Literal

from tsdkd.cli import defaults, options
from tsdkd.cli.console import Reporter, show_next, show_pairs
from tsdkd.stages.config import GenerateConfig


def command(
    run: options.Run = options.RUN,
    prompts: options.Prompts = None,
    column: options.Column = None,
    limit: Annotated[int | None, options.count("Only the first prompts.", options.DATA)] = GenerateConfig.limit,
    rollouts: options.Rollouts = None,
    overwrite: options.Overwrite = False,
    student: options.Student = None,
    teacher: options.Teacher = None,
    policy: Annotated[
        Literal["student", "teacher"],
        options.choice("Who answers: student is on-policy, teacher off-policy.", options.METHOD),
    ] = GenerateConfig.policy,
    samples_per_prompt: Annotated[
        int, options.count("Responses per prompt.", options.METHOD)
    ] = GenerateConfig.samples_per_prompt,
    temperature: Annotated[
        float, options.number("Sampling temperature; 0 is greedy.", options.METHOD, least=0)
    ] = GenerateConfig.temperature,
    top_p: Annotated[
        float, options.number("Nucleus sampling.", options.METHOD, least=0, most=1)
    ] = GenerateConfig.top_p,
    max_new_tokens: Annotated[int, options.count("Longest response.", options.METHOD)] = GenerateConfig.max_new_tokens,
    max_prompt_tokens: Annotated[
        int, options.count("Longer prompts are left out.", options.METHOD)
    ] = GenerateConfig.max_prompt_tokens,
    seed: options.Seed = 0,
    batch_size: Annotated[
        int, options.count("Responses sampled at a time.", options.ENGINE)
    ] = GenerateConfig.batch_size,
    part_size: Annotated[
        int, options.count("Responses per file: what an interruption can cost.", options.ENGINE)
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
    show_next(f"tsdkd score{options.at(run)}{options.named('--rollouts', rollouts)}")
