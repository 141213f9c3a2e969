"""The options of `tsdkd train` that make its objective."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tsdkd.cli import options
from tsdkd.core.config import RELEASED, DivergenceName, TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.train import ReplayConfig
from tsdkd.stages.methods import METHODS, find_method

PANEL = "Objective (the paper's symbols; others than tsdkd have few of them)"
REPLAY = "Replays (with --method distillm)"

Name = Annotated[str, typer.Option("--method", metavar="NAME", help=f"{', '.join(METHODS)}.", rich_help_panel=PANEL)]
Alpha = Annotated[float, options.number("Weight of the ranking term.", PANEL, least=0)]
Beta = Annotated[float, options.number("JSD: 0 forward KL, 1 reverse KL.", PANEL, least=0, most=1)]
Divergence = Annotated[
    DivergenceName, typer.Option(metavar="NAME", help="jsd, skew-kl or skew-reverse-kl.", rich_help_panel=PANEL)
]
Skew = Annotated[float, options.number("Of the skew divergences.", PANEL)]
Tau = Annotated[float, options.number("Sharpness of the gate.", PANEL)]
Gate = Annotated[bool, options.choice("Weigh the divergence by the entropy gap.", PANEL)]
K = Annotated[int, options.count("Candidates ranked.", PANEL, least=2)]
Opener = Annotated[
    str, typer.Option(metavar="X", help="Share of entropy in the opener, or adaptive.", rich_help_panel=PANEL)
]
EmRatio = Annotated[float, options.number("Share of positions whose entropy falls.", PANEL)]
Temperature = Annotated[float, options.number("KD temperature.", PANEL)]
IndirectReduction = Annotated[Literal["mean", "sum"], options.choice("Of the ranking term, over the opener.", PANEL)]
DirectWeight = Annotated[float, options.number("Weight of the divergence.", PANEL, least=0)]
EmWeight = Annotated[float, options.number("Weight of the entropy term.", PANEL, least=0)]
Released = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help=f"As in the released code: {', '.join(RELEASED)}; joined by commas.",
        show_default="none",
        rich_help_panel=PANEL,
    ),
]
Phi = Annotated[float, options.number("Chance of the student's own answers, at first.", REPLAY, least=0, most=1)]
PhiRise = Annotated[float, options.number("Of phi, when held-out KL is too high.", REPLAY, least=0, most=1)]
Tolerance = Annotated[float, options.number("Nats it may be higher.", REPLAY, least=0)]
Capacity = Annotated[int, options.count("Answers kept for replay.", REPLAY)]


def chosen(name: str, context: typer.Context) -> TSDKDConfig:
    """The objective's own loss, with the options that were given by hand."""
    given = _given(context, TSDKDConfig)
    if "opener" in given:
        given["opener"] = options.opener_share(given["opener"])
    if "released" in given:
        given["released"] = _released(given["released"])
    return find_method(name).with_options(given)


def replays(name: str, context: typer.Context) -> ReplayConfig | None:
    given = _given(context, ReplayConfig)
    if find_method(name).uses_replay:
        return ReplayConfig(**given)
    if given:
        raise InputError("Options of replays are given without them.", "Leave them out, or give --method distillm.")
    return None


def scores(name: str, told: Path | None, run: Path) -> Path | None:
    """Where the scores are that the objective needs."""
    if find_method(name).needs_teacher:
        return told or run / "scores"
    if told:
        raise InputError(f"The objective {name} needs no scores.", "Leave out --scores.")
    return None


def share_answered(name: str, lambda_: float | None) -> float:
    """The paper's lambda: as given, else all where the objective learns from fresh answers and no schedule decides."""
    objective = find_method(name)
    return float(objective.online_responses and not objective.uses_replay) if lambda_ is None else lambda_


def mixture(name: str, share: float | None) -> dict[str, Any]:
    """Of `GenerateConfig`, who samples an answer's tokens: the student, or both where the teacher has a share."""
    share = find_method(name).teacher_fraction if share is None else share
    if not share:
        return {"policy": GenerateConfig.policy, "teacher_fraction": GenerateConfig.teacher_fraction}
    return {"policy": "teacher-mixed", "teacher_fraction": share}


def _given(context: typer.Context, config: type) -> dict[str, Any]:
    """The fields of a config whose options stand on the command line."""
    known = {field.name for field in fields(config)}
    return {name: value for name, value in context.params.items() if name in known and _by_hand(context, name)}


def _by_hand(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _released(names: str) -> tuple[str, ...]:
    """In the order of `RELEASED`; unknown ones are the config's to refuse."""
    given = names.split(",")
    return tuple(name for name in (*RELEASED, *sorted(set(given) - set(RELEASED))) if name in given)
