"""tsdkd generate"""

from typing import Annotated

import typer

from tsdkd.cli import defaults, options
from tsdkd.cli.console import ConsoleObserver, show_next, show_pairs
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.types import EngineName, Policy


def command(
    context: typer.Context,
    run: options.Run = options.RUN,
    prompts: options.Prompts = None,
    column: options.Column = None,
    config_name: Annotated[
        str | None, options.text("A dataset's configuration.", options.DATA, "its only one")
    ] = GenerateConfig.config_name,
    split: Annotated[str | None, options.text("A dataset's split.", options.DATA, "train")] = GenerateConfig.split,
    limit: Annotated[int | None, options.count("Only the first prompts.", options.DATA)] = GenerateConfig.limit,
    rollouts: options.Rollouts = None,
    overwrite: options.Overwrite = False,
    student: options.Student = None,
    teacher: options.Teacher = None,
    policy: Annotated[
        Policy,
        options.choice(
            "Who answers: the student (on-policy), the teacher (off-policy), each its share of the prompts, or both, "
            "token by token.",
            options.METHOD,
        ),
    ] = GenerateConfig.policy,
    student_fraction: Annotated[
        float, options.number("Mixed: share the student answers.", options.METHOD, 0, 1, "--lambda")
    ] = GenerateConfig.student_fraction,
    accept_k: Annotated[
        int, options.count("Speculative: the teacher's best K stay.", options.METHOD)
    ] = GenerateConfig.accept_k,
    draft_tokens: Annotated[
        int, options.count("Token by token: drafted at once.", options.METHOD)
    ] = GenerateConfig.draft_tokens,
    teacher_fraction: Annotated[
        float, options.number("Teacher-mixed: its part in each token.", options.METHOD, 0, 1)
    ] = GenerateConfig.teacher_fraction,
    system: Annotated[
        str | None, options.text("System message of prompts without one.", options.METHOD, "none")
    ] = GenerateConfig.system,
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
    engine: Annotated[
        EngineName, options.choice("What samples; auto: vLLM where it is installed.", options.ENGINE)
    ] = GenerateConfig.engine,
    batch_size: Annotated[
        int, options.count("Transformers: responses sampled at a time.", options.ENGINE)
    ] = GenerateConfig.batch_size,
    part_size: Annotated[
        int | None, options.count("Responses per file: what an interruption costs.", options.ENGINE)
    ] = GenerateConfig.part_size,
    dtype: options.DTypeName = GenerateConfig.dtype,
    tensor_parallel: Annotated[int, options.count("GPUs per copy.", options.VLLM)] = GenerateConfig.tensor_parallel,
    data_parallel: Annotated[int, options.count("Copies of the model.", options.VLLM)] = GenerateConfig.data_parallel,
    memory_fraction: Annotated[
        float, options.number("Share of each GPU's memory to use.", options.VLLM, 0, 1)
    ] = GenerateConfig.memory_fraction,
    max_model_len: Annotated[
        int | None, options.count("Longest sequence in tokens.", options.VLLM)
    ] = GenerateConfig.max_model_len,
    quantization: Annotated[
        str | None, options.text("How weights are quantised, such as fp8.", options.VLLM, "as saved")
    ] = GenerateConfig.quantization,
) -> None:
    """Prompts -> rollouts: responses of the student (on-policy), of the teacher (off-policy), or of both."""
    from tsdkd.stages.generate.stage import format_left_out, generate

    config = options.configured(GenerateConfig, context)
    names = {} if policy == "teacher" else {"student": defaults.student(student)}
    names |= {} if policy == "student" else {"teacher": defaults.teacher(teacher)}
    artifact = generate(
        prompts or defaults.PROMPTS,
        next(iter(names.values())),
        rollouts or run / "rollouts",
        config,
        seed,
        ConsoleObserver(),
        overwrite,
        teacher=names.get("teacher"),
    )
    manifest, found = artifact.manifest, artifact.manifest.summary
    per_response = found["response_tokens"] / found["responses"]
    share = f", {found['teacher_tokens'] / found['response_tokens']:.0%} the teacher's" if len(names) > 1 else ""
    show_pairs(
        "rollouts",
        [
            ("at", str(artifact.path)),
            *names.items(),
            ("engine", f"{manifest.engine} {manifest.libraries[manifest.engine]}"),
            (
                "prompts",
                f"{found['prompts']:,} (left out: {format_left_out(found['prompts_left_out'], max_prompt_tokens)})",
            ),
            ("responses", f"{found['responses']:,}, {found['truncated']:,} truncated"),
            ("tokens", f"{found['response_tokens']:,} ({per_response:.0f} a response{share})"),
        ],
    )
    show_next(f"tsdkd score{options.at(run)}{options.named('--rollouts', rollouts)}")
