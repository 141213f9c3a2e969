"""tsdkd train"""

from typing import Annotated, Literal

import typer

from tsdkd.cli import defaults, options
from tsdkd.cli.console import Reporter, show_next, show_pairs
from tsdkd.core.config import TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.config import TrainConfig

OBJECTIVE = "Objective (the paper's symbols)"


def command(
    run: options.Run = options.RUN,
    rollouts: options.Rollouts = None,
    scores: options.Scores = None,
    checkpoint: options.Checkpoint = None,
    overwrite: options.Overwrite = False,
    student: options.Student = None,
    alpha: Annotated[float, options.number("Weight of the ranking term.", OBJECTIVE, least=0)] = TSDKDConfig.alpha,
    beta: Annotated[
        float, options.number("JSD: 0 forward KL, 1 reverse KL.", OBJECTIVE, least=0, most=1)
    ] = TSDKDConfig.beta,
    tau: Annotated[float, options.number("Sharpness of the gate.", OBJECTIVE)] = TSDKDConfig.tau,
    gate: Annotated[bool, options.choice("Weigh the divergence by the entropy gap.", OBJECTIVE)] = TSDKDConfig.gate,
    k: Annotated[int, options.count("Candidates ranked.", OBJECTIVE, least=2)] = TSDKDConfig.k,
    opener: Annotated[
        str, typer.Option(metavar="X", help="Share of entropy in the opener, or adaptive.", rich_help_panel=OBJECTIVE)
    ] = str(TSDKDConfig.opener),
    em_ratio: Annotated[
        float, options.number("Share of positions whose entropy falls.", OBJECTIVE)
    ] = TSDKDConfig.em_ratio,
    temperature: Annotated[float, options.number("KD temperature.", OBJECTIVE)] = TSDKDConfig.temperature,
    indirect_reduction: Annotated[
        Literal["mean", "sum"], options.choice("Of the ranking term, over the opener.", OBJECTIVE)
    ] = TSDKDConfig.indirect_reduction,
    direct_weight: Annotated[
        float, options.number("Weight of the divergence.", OBJECTIVE, least=0)
    ] = TSDKDConfig.direct_weight,
    em_weight: Annotated[
        float, options.number("Weight of the entropy term.", OBJECTIVE, least=0)
    ] = TSDKDConfig.em_weight,
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
        Literal["auto", "bf16", "fp32"],
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
            help="Faster steps with --signal hidden; compiling takes seconds.",
            rich_help_panel=options.ENGINE,
        ),
    ] = TrainConfig.compile,
    save_steps: Annotated[
        int, options.count("Steps between saves: what an interruption can cost.", options.ENGINE)
    ] = TrainConfig.save_steps,
) -> None:
    """Rollouts + scores -> checkpoint: the student learns, the teacher is absent."""
    config = TrainConfig(
        objective=TSDKDConfig(
            alpha=alpha,
            beta=beta,
            tau=tau,
            gate=gate,
            k=k,
            opener=_opener(opener),
            em_ratio=em_ratio,
            temperature=temperature,
            indirect_reduction=indirect_reduction,
            direct_weight=direct_weight,
            em_weight=em_weight,
        ),
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        warmup_ratio=warmup_ratio,
        schedule=schedule,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        compile=compile_,
        save_steps=save_steps,
    )
    from tsdkd.artifacts import read

    scored = scores or run / "scores"
    recorded = read(scored, "scores", hashed=False).manifest

    from tsdkd.stages.train import train

    learner = defaults.student(student, recorded)
    artifact = train(
        rollouts or run / "rollouts",
        scored,
        learner,
        checkpoint or run / "checkpoint",
        config,
        seed,
        Reporter(),
        overwrite,
    )
    found = artifact.manifest.summary
    show_pairs(
        "checkpoint",
        [
            ("at", str(artifact.path)),
            ("student", learner),
            ("teacher (absent)", recorded.model("teacher").name),
            ("steps", f"{found['steps']} of {batch_size} responses, {artifact.manifest.config['precision']}"),
            *[
                (label, f"{found[f'{name}_first']:.3f} -> {found[f'{name}_last']:.3f}")
                for name, label in (
                    ("loss", "loss"),
                    ("indirect", f"ranking (weight {alpha:g})"),
                    ("direct", f"divergence (weight {direct_weight:g})"),
                    ("entropy", f"top entropies (weight {em_weight:g})"),
                    ("student_entropy", "student's mean entropy"),
                )
                if f"{name}_first" in found
            ],
        ],
    )
    show_next(f"tsdkd eval{options.at(run)}{options.named('--checkpoint', checkpoint)}")


def _opener(value: str) -> float | Literal["adaptive"]:
    if value == "adaptive":
        return "adaptive"
    try:
        return float(value)
    except ValueError:
        raise InputError(f"--opener is {value!r}.", "Give a share such as 0.1, or adaptive.") from None
