"""tsdkd train"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tsdkd.cli import defaults, options, train_methods
from tsdkd.cli.console import ConsoleObserver, show_next, show_pairs
from tsdkd.core.config import TERMS, TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.train import LoRAConfig, OnlineConfig, ReplayConfig, TrainConfig
from tsdkd.stages.config.types import DType, EngineName
from tsdkd.stages.metrics.names import METRICS, SUMMARY_METRICS

if TYPE_CHECKING:
    from tsdkd.artifacts.manifest import Manifest

LIVE = "Live training (with --prompts, --teacher or --lambda: no scores are needed)"
LORA = "Adapters (with --lora)"
HEALTH = "Watching"


def command(
    context: typer.Context,
    run: options.Run = options.RUN,
    rollouts: options.Rollouts = None,
    scores: options.Scores = None,
    checkpoint: options.Checkpoint = None,
    overwrite: options.Overwrite = False,
    student: options.Student = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts that the student answers.", show_default="the embedded ones", rich_help_panel=LIVE),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Reads the answers.", show_default="the embedded teacher", rich_help_panel=LIVE),
    ] = None,
    lambda_: Annotated[
        float | None,
        typer.Option(
            "--lambda",
            metavar="X",
            help="Share answered afresh; others keep --rollouts.",
            show_default="1",
            rich_help_panel=LIVE,
        ),
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Of the prompts.", show_default="messages, else prompt", rich_help_panel=LIVE)
    ] = GenerateConfig.column,
    limit: Annotated[int | None, options.count("Only the first prompts.", LIVE)] = GenerateConfig.limit,
    sample_temperature: Annotated[
        float, options.number("Of the answers; 0 is greedy.", LIVE, least=0)
    ] = GenerateConfig.temperature,
    top_p: Annotated[float, options.number("Nucleus sampling.", LIVE, least=0, most=1)] = GenerateConfig.top_p,
    max_new_tokens: Annotated[int, options.count("Longest answer.", LIVE)] = GenerateConfig.max_new_tokens,
    max_prompt_tokens: Annotated[int, options.count("Longer prompts go.", LIVE)] = GenerateConfig.max_prompt_tokens,
    sample_batch_size: Annotated[int, options.count("Answers sampled at a time.", LIVE)] = GenerateConfig.batch_size,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Of prompts that bring none.", rich_help_panel=LIVE)
    ] = GenerateConfig.system,
    teacher_fraction: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Its part in sampling each token.",
            show_default="0; minillm: 0.2",
            min=0,
            max=1,
            rich_help_panel=LIVE,
        ),
    ] = None,
    engine: Annotated[
        EngineName, typer.Option(help="Samples; auto: vLLM if installed.", rich_help_panel=LIVE)
    ] = GenerateConfig.engine,
    memory_fraction: Annotated[float, options.number("Of the GPU, for vLLM.", LIVE, least=0, most=1)] = 0.3,
    teacher_dtype: Annotated[
        DType, typer.Option(help="Precision; auto: as saved.", rich_help_panel=LIVE)
    ] = OnlineConfig.teacher_dtype,
    teacher_device: Annotated[
        str | None,
        typer.Option(help="Such as cpu, or auto: spread.", show_default="the student's", rich_help_panel=LIVE),
    ] = OnlineConfig.teacher_device,
    lora: Annotated[bool, typer.Option("--lora", help="Train adapters alone.", rich_help_panel=LORA)] = False,
    lora_rank: Annotated[int, options.count("Width of an adapter.", LORA)] = LoRAConfig.rank,
    lora_alpha: Annotated[int, options.count("Scale: alpha / rank.", LORA)] = LoRAConfig.alpha,
    lora_dropout: Annotated[float, options.number("Before adapters.", LORA, least=0)] = LoRAConfig.dropout,
    lora_targets: Annotated[
        str, typer.Option(metavar="NAMES", help="Modules, joined by commas.", rich_help_panel=LORA)
    ] = LoRAConfig.targets,
    merge: Annotated[bool, typer.Option("--merge", help="Save full weights.", rich_help_panel=LORA)] = LoRAConfig.merge,
    method: train_methods.Name = TrainConfig.method,
    alpha: train_methods.Alpha = TSDKDConfig.alpha,
    beta: train_methods.Beta = TSDKDConfig.beta,
    divergence: train_methods.Divergence = TSDKDConfig.divergence,
    skew: train_methods.Skew = TSDKDConfig.skew,
    tau: train_methods.Tau = TSDKDConfig.tau,
    gate: train_methods.Gate = TSDKDConfig.gate,
    k: train_methods.K = TSDKDConfig.k,
    opener: train_methods.Opener = str(TSDKDConfig.opener),
    em_ratio: train_methods.EmRatio = TSDKDConfig.em_ratio,
    temperature: train_methods.Temperature = TSDKDConfig.temperature,
    indirect_reduction: train_methods.IndirectReduction = TSDKDConfig.indirect_reduction,
    direct_weight: train_methods.DirectWeight = TSDKDConfig.direct_weight,
    em_weight: train_methods.EmWeight = TSDKDConfig.em_weight,
    released: train_methods.Released = None,
    phi: train_methods.Phi = ReplayConfig.phi,
    phi_step: train_methods.PhiRise = ReplayConfig.phi_step,
    replay_tolerance: train_methods.Tolerance = ReplayConfig.replay_tolerance,
    replay_capacity: train_methods.Capacity = ReplayConfig.replay_capacity,
    learning_rate: Annotated[
        float, options.number("AdamW's, at its highest.", options.METHOD, least=0)
    ] = TrainConfig.learning_rate,
    epochs: Annotated[float, options.number("Passes over the rollouts.", options.METHOD)] = TrainConfig.epochs,
    batch_size: Annotated[int, options.count("Responses per optimizer step.", options.METHOD)] = TrainConfig.batch_size,
    warmup_ratio: Annotated[
        float, options.number("Share of steps in which the rate rises.", options.METHOD, least=0, most=1)
    ] = TrainConfig.warmup_ratio,
    schedule: Annotated[
        Literal["cosine", "linear", "constant_with_warmup"],
        typer.Option(metavar="NAME", help="cosine, linear or constant_with_warmup.", rich_help_panel=options.METHOD),
    ] = TrainConfig.schedule,
    weight_decay: Annotated[float, options.number("AdamW's.", options.METHOD, least=0)] = TrainConfig.weight_decay,
    max_grad_norm: Annotated[
        float, options.number("Longer gradients are cut to this norm.", options.METHOD, least=0)
    ] = TrainConfig.max_grad_norm,
    seed: options.Seed = 0,
    micro_batch_size: Annotated[
        int, options.count("Responses per forward; does not change the result.", options.ENGINE)
    ] = TrainConfig.micro_batch_size,
    precision: Annotated[
        Literal["auto", "bfloat16", "float32"],
        options.choice("auto: bf16 where the hardware has it; weights stay float32.", options.ENGINE),
    ] = TrainConfig.precision,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing", help="Less memory for a second forward.", rich_help_panel=options.ENGINE
        ),
    ] = TrainConfig.gradient_checkpointing,
    compile_: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Faster steps with --signal hidden: C++ (compiled in seconds), Triton on a GPU.",
            rich_help_panel=options.ENGINE,
        ),
    ] = TrainConfig.compile,
    attention: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="transformers' implementation, such as sdpa.",
            show_default="eager on CPUs, else sdpa",
            rich_help_panel=options.ENGINE,
        ),
    ] = TrainConfig.attention,
    held_out: Annotated[
        float, options.number("Share of prompts only measured on.", HEALTH, least=0, most=1)
    ] = TrainConfig.held_out,
    eval_steps: Annotated[
        int, options.count("Steps between measurements; the best is kept.", HEALTH, least=0)
    ] = TrainConfig.eval_steps,
    stop_on_collapse: Annotated[
        bool,
        typer.Option("--stop-on-collapse", help="End a run that degenerates.", rich_help_panel=HEALTH),
    ] = TrainConfig.stop_on_collapse,
    tracker: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="tensorboard, trackio or wandb; repeatable.", rich_help_panel=HEALTH),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="A line a minute, for logs: nothing moves.", rich_help_panel=HEALTH)
    ] = False,
    save_steps: Annotated[
        int, options.count("Steps between saves: what an interruption can cost.", options.ENGINE)
    ] = TrainConfig.save_steps,
) -> None:
    """Rollouts + scores -> checkpoint: the student learns, the teacher is absent; or prompts + a live teacher."""
    config = configured(context)
    output, observer = checkpoint or run / "checkpoint", ConsoleObserver(plain=plain)
    from tsdkd.artifacts.reader import read_artifact

    if config.online:
        from tsdkd.stages.train.stage import train_online

        recorded = read_artifact(rollouts, "rollouts", hashed=False).manifest if rollouts else None
        models = defaults.student(student, recorded), defaults.teacher(teacher, recorded)
        data = rollouts or prompts or defaults.PROMPTS
        artifact = train_online(data, *models, output, config, seed, observer, overwrite)
    else:
        answers, scored = rollouts or run / "rollouts", train_methods.scores(method, scores, run)
        recorded = (
            read_artifact(scored, "scores", hashed=False)
            if scored
            else read_artifact(answers, "rollouts", hashed=False)
        ).manifest

        from tsdkd.stages.train.stage import train_offline

        name = defaults.student(student, recorded)
        artifact = train_offline(answers, scored, name, output, config, seed, observer, overwrite)
    show_pairs("checkpoint", [("at", str(artifact.path)), *_rows(config, artifact.manifest)])
    show_next(f"tsdkd eval{options.at(run)}{options.named('--checkpoint', checkpoint)}")


def configured(context: typer.Context) -> TrainConfig:
    """Raises InputError for options that do not go together."""
    given = context.params
    online = any(given[name] is not None for name in ("prompts", "teacher", "lambda_"))
    sampling = options.configured(
        GenerateConfig,
        context,
        temperature=given["sample_temperature"],
        batch_size=given["sample_batch_size"],
        **train_methods.mixture(given["method"], given["teacher_fraction"]),
    )
    sampled = options.configured(
        OnlineConfig,
        context,
        student_fraction=train_methods.share_answered(given["method"], given["lambda_"]),
        sampling=sampling,
        replay=train_methods.replays(given["method"], context),
    )
    if given["teacher_fraction"] and not (sampled.student_fraction or sampled.replay):
        raise InputError(
            "--teacher-fraction is of fresh answers, and there are none.", "Leave it out, or raise --lambda."
        )
    adapter = LoRAConfig(
        given["lora_rank"], given["lora_alpha"], given["lora_dropout"], given["lora_targets"], given["merge"]
    )
    usual = GenerateConfig(**train_methods.mixture(given["method"], None), memory_fraction=0.3)
    untold = OnlineConfig(sampled.student_fraction, usual, replay=sampled.replay)
    if not online and sampled != untold:
        raise InputError("Options of live training are given without it.", "Give --prompts, --teacher or --lambda.")
    if online and given["scores"]:
        raise InputError("--scores are for staged training.", "Leave out --scores, or the options of live training.")
    if online and given["rollouts"] and (given["column"] or given["system"]):
        raise InputError("Rollouts have their prompts: --column and --system say nothing.", "Leave them out.")
    if given["prompts"] and given["rollouts"]:
        raise InputError("--prompts and --rollouts are both given.", "Choose where the prompts come from.")
    if not given["lora"] and adapter != LoRAConfig():
        raise InputError("Options of adapters are given without --lora.", "Give --lora, or leave them out.")
    return options.configured(
        TrainConfig,
        context,
        method=given["method"],
        objective=train_methods.chosen(given["method"], context),  # which of its options were given, the context knows
        online=sampled if online else None,
        lora=adapter if given["lora"] else None,
        compile=given["compile_"],
        trackers=tuple(given["tracker"] or ()),
    )


def _rows(config: TrainConfig, manifest: Manifest) -> list[tuple[str, str]]:
    summary = manifest.summary
    rows = [
        ("student", manifest.model("student").name),
        (f"teacher ({'online' if config.online else 'absent'})", manifest.model("teacher").name),
        ("method", config.method),
        ("steps", f"{summary['steps']} of {config.batch_size} responses, {manifest.config['precision']}"),
    ]
    for name in SUMMARY_METRICS:
        if f"{name}_first" in summary:
            weight = f" (weight {getattr(config.objective, TERMS[name]):g})" if name in TERMS else ""
            values = f"{summary[f'{name}_first']:.3f} -> {summary[f'{name}_last']:.3f}"
            rows.append((f"{METRICS[name].label}{weight}", values))
    if "best_step" in summary:
        rows.append(("best step", f"{summary['best_step']}, KL {summary['best_kl']:.4f} on held-out prompts"))
    if "degenerated_at" in summary:
        saved = summary.get("best_step", summary["steps"])
        rows.append(("degenerated", f"at step {summary['degenerated_at']}; the checkpoint is step {saved}"))
    return rows
