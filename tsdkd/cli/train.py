"""tsdkd train"""

from typing import Annotated, Any, Literal

import typer

from tsdkd.cli import defaults, options
from tsdkd.cli.console import Reporter, show_next, show_pairs
from tsdkd.core.config import TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.config import TrainConfig

OBJECTIVE = "Objective (the paper's symbols)"


def _objective(help_: str, **limits: Any) -> Any:
    return typer.Option(help=help_, rich_help_panel=OBJECTIVE, **limits)


def command(
    run: options.Run = options.RUN,
    rollouts: options.Rollouts = None,
    scores: options.Scores = None,
    checkpoint: options.Checkpoint = None,
    overwrite: options.Overwrite = False,
    student: options.Student = None,
    alpha: Annotated[float, _objective("Weight of the ranking term.", min=0)] = TSDKDConfig.alpha,
    beta: Annotated[float, _objective("JSD: 0 forward KL, 1 reverse KL.", min=0, max=1)] = TSDKDConfig.beta,
    tau: Annotated[float, _objective("Sharpness of the gate.")] = TSDKDConfig.tau,
    gate: Annotated[bool, _objective("Weigh the divergence by the entropy gap.")] = TSDKDConfig.gate,
    k: Annotated[int, typer.Option("--k", help="Candidates ranked.", min=2, rich_help_panel=OBJECTIVE)] = TSDKDConfig.k,
    opener: Annotated[str, _objective("Share of entropy in the opener, or adaptive.")] = str(TSDKDConfig.opener),
    em_ratio: Annotated[float, _objective("Share of positions whose entropy falls.")] = TSDKDConfig.em_ratio,
    temperature: Annotated[float, _objective("KD temperature.")] = TSDKDConfig.temperature,
    indirect_reduction: Annotated[
        Literal["mean", "sum"], _objective("Over the opener.")
    ] = TSDKDConfig.indirect_reduction,
    direct_weight: Annotated[float, _objective("Weight of the divergence.", min=0)] = TSDKDConfig.direct_weight,
    em_weight: Annotated[float, _objective("Weight of the entropy term.", min=0)] = TSDKDConfig.em_weight,
    learning_rate: Annotated[float, typer.Option(min=0, rich_help_panel=options.METHOD)] = TrainConfig.learning_rate,
    epochs: Annotated[float, typer.Option(rich_help_panel=options.METHOD)] = TrainConfig.epochs,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Responses per optimizer step.", rich_help_panel=options.METHOD)
    ] = TrainConfig.batch_size,
    warmup_ratio: Annotated[
        float, typer.Option(min=0, max=1, rich_help_panel=options.METHOD)
    ] = TrainConfig.warmup_ratio,
    schedule: Annotated[
        Literal["cosine", "linear", "constant_with_warmup"], typer.Option(rich_help_panel=options.METHOD)
    ] = TrainConfig.schedule,
    weight_decay: Annotated[float, typer.Option(min=0, rich_help_panel=options.METHOD)] = TrainConfig.weight_decay,
    max_grad_norm: Annotated[
        float, typer.Option(min=0, help="Clipping.", rich_help_panel=options.METHOD)
    ] = TrainConfig.max_grad_norm,
    seed: options.Seed = 0,
    micro_batch_size: Annotated[
        int, typer.Option(min=1, help="Responses per forward.", rich_help_panel=options.ENGINE)
    ] = TrainConfig.micro_batch_size,
    precision: Annotated[
        Literal["auto", "bf16", "fp32"],
        typer.Option(
            help="auto: bf16 where the hardware has it; weights stay float32.", rich_help_panel=options.ENGINE
        ),
    ] = TrainConfig.precision,
    gradient_checkpointing: Annotated[
        bool, typer.Option(rich_help_panel=options.ENGINE)
    ] = TrainConfig.gradient_checkpointing,
    save_steps: Annotated[
        int,
        typer.Option(min=1, help="Steps between saves: what an interruption can cost.", rich_help_panel=options.ENGINE),
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
                (name, f"{found[f'{name}_first']:.3f} -> {found[f'{name}_last']:.3f}")
                for name in ("loss", "indirect", "direct", "entropy")
                if f"{name}_first" in found
            ],
        ],
    )
    show_next(f"tsdkd eval{options.at(run)}")


def _opener(value: str) -> float | Literal["adaptive"]:
    if value == "adaptive":
        return "adaptive"
    try:
        return float(value)
    except ValueError:
        raise InputError(f"--opener is {value!r}.", "Give a share such as 0.1, or adaptive.") from None
