"""The configuration of `tsdkd train`: options that belong together, with the defaults of the method."""

from pathlib import Path
from typing import Any

import typer

from tsdkd.cli.options import option_values
from tsdkd.core.config import RELEASED, TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.option import build
from tsdkd.stages.config.train import LoRAConfig, OnlineConfig, ReplayConfig, TrainConfig
from tsdkd.stages.methods import Method, find_method


def read_train_config(context: typer.Context) -> TrainConfig:
    """Raises InputError for options that do not go together."""
    method = find_method(context.params["method"])
    nested = {
        "objective": read_objective(context, method),
        "online": _online(context, method),
        "lora": _lora(context),
    }
    config: TrainConfig = build(TrainConfig, option_values(context, TrainConfig) | nested)
    return config


def read_objective(context: typer.Context, method: Method) -> TSDKDConfig:
    """The method's objective with the given options. Raises InputError for an option that the method does not have."""
    given = _given(context, "objective.")
    if "released" in given:
        given["released"] = _ordered(given["released"])
    return method.with_options(given)


def scores_path(config: TrainConfig, scores: Path | None, run: Path) -> Path | None:
    """The scores that the method needs; None if it needs none."""
    if find_method(config.method).needs_teacher:
        return scores or run / "scores"
    if scores:
        raise InputError(f"The method {config.method} needs no scores.", "Leave out --scores.")
    return None


def _online(context: typer.Context, method: Method) -> OnlineConfig | None:
    """None for offline training."""
    inputs = context.params
    given = _given(context, "online.")
    replay = _replay(method, {name: given.pop(name) for name in list(given) if name.startswith("replay.")})
    selecting = any(inputs[name] for name in ("prompts", "teacher", "teacher_url"))
    if not selecting and "student_fraction" not in given:
        if given:
            raise InputError(
                "Options of online training are given without it.",
                "Give --prompts, --teacher, --teacher-url or --lambda.",
            )
        return None
    values = option_values(context, TrainConfig, prefix="online.")
    sampling = {name.removeprefix("sampling."): value for name, value in values.items() if name.startswith("sampling.")}
    sampling |= _mixture(given.get("sampling.teacher_fraction", method.teacher_fraction))
    fraction = given.get("student_fraction", float(method.online_responses and not method.uses_replay))
    nested = {"sampling": build(GenerateConfig, sampling), "student_fraction": fraction, "replay": replay}
    config: OnlineConfig = build(OnlineConfig, values | nested)
    if given.get("sampling.teacher_fraction") and not (fraction or replay):
        raise InputError(
            "--teacher-fraction needs sampled responses, and --lambda is 0.", "Leave it out, or raise --lambda."
        )
    if inputs["scores"]:
        raise InputError("--scores is for offline training.", "Leave out --scores, or the options of online training.")
    if inputs["rollouts"] and (config.sampling.column or config.sampling.system):
        raise InputError("Rollouts hold their prompts: --column and --system have no effect.", "Leave them out.")
    if inputs["prompts"] and inputs["rollouts"]:
        raise InputError("--prompts and --rollouts are both given.", "Give one of them.")
    return config


def _replay(method: Method, given: dict[str, Any]) -> ReplayConfig | None:
    if method.uses_replay:
        return ReplayConfig(**{name.removeprefix("replay."): value for name, value in given.items()})
    if given:
        raise InputError(
            f"The method {method.name} replays no responses.", "Leave out options of replay, or give --method distillm."
        )
    return None


def _mixture(fraction: float) -> dict[str, Any]:
    """The policy of sampling, for the teacher's weight in the mixture."""
    if not fraction:
        return {"policy": GenerateConfig.policy, "teacher_fraction": GenerateConfig.teacher_fraction}
    return {"policy": "teacher-mixed", "teacher_fraction": fraction}


def _lora(context: typer.Context) -> LoRAConfig | None:
    if context.params["lora"]:
        return LoRAConfig(**option_values(context, TrainConfig, prefix="lora."))
    if _given(context, "lora."):
        raise InputError("Options of LoRA are given without --lora.", "Give --lora, or leave them out.")
    return None


def _given(context: typer.Context, prefix: str) -> dict[str, Any]:
    return option_values(context, TrainConfig, given=True, prefix=prefix)


def _ordered(names: tuple[str, ...]) -> tuple[str, ...]:
    """In the order of `RELEASED`; the configuration refuses unknown names."""
    return tuple(name for name in (*RELEASED, *sorted(set(names) - set(RELEASED))) if name in names)
