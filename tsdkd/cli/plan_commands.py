"""The commands of a plan: each stage's options as a row of the table; other commands cost nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tsdkd.cli import defaults, options
from tsdkd.cli.eval import parse_models, read_eval_config
from tsdkd.cli.generate import require_used_models
from tsdkd.cli.train_config import read_train_config, scores_path
from tsdkd.stages.config.generate import GIVEN, GenerateConfig
from tsdkd.stages.config.score import ScoreConfig

if TYPE_CHECKING:
    from tsdkd.stages.data.prompts import Prompts
    from tsdkd.stages.plan.stage import Planner, PlanRow


def plan_command(context: typer.Context, planner: Planner) -> PlanRow:
    """The row of a parsed command. Raises InputError for options that the command would refuse."""
    return _PLANNED.get(str(context.info_name), _plan_without_cost)(context, planner)


def _plan_without_cost(context: typer.Context, planner: Planner) -> PlanRow:
    from tsdkd.stages.plan.stage import PlanRow

    return PlanRow(str(context.info_name), "", None)


def _plan_generate(context: typer.Context, planner: Planner) -> PlanRow:
    given, config = context.params, options.read_config(context, GenerateConfig)
    require_used_models(config, given["student"], given["teacher"])
    unused = {"student": {"teacher"}, "teacher": {"student", GIVEN}}
    roles = [role for role, policies in unused.items() if config.policy not in policies]
    output = _path(given, "rollouts")
    return planner.generate(_prompts(given, config), _models(given, *roles), output, config, given["overwrite"])


def _plan_score(context: typer.Context, planner: Planner) -> PlanRow:
    given, config = context.params, options.read_config(context, ScoreConfig)
    models = _models(given, "student", "teacher")
    return planner.score(_path(given, "rollouts"), models, _path(given, "scores"), config, given["overwrite"])


def _plan_train(context: typer.Context, planner: Planner) -> PlanRow:
    given, config = context.params, read_train_config(context)
    models, output = _models(given, "student", "teacher"), _path(given, "checkpoint")
    if config.online:
        rollouts = Path(given["rollouts"]) if given["rollouts"] else None
        prompts = _prompts(given, config.online.sampling)
        return planner.train(rollouts, None, prompts, models, output, config, given["overwrite"])
    scores = scores_path(config, Path(given["scores"]) if given["scores"] else None, Path(given["run"]))
    return planner.train(_path(given, "rollouts"), scores, None, models, output, config, given["overwrite"])


def _plan_eval(context: typer.Context, planner: Planner) -> PlanRow:
    from tsdkd.stages.results.compare import run_models

    given = context.params
    if given["compare"]:
        return _plan_without_cost(context, planner)
    config, models = read_eval_config(context), parse_models("--model", list(given["model"] or ()))
    if not models:
        checkpoint = _path(given, "checkpoint")
        models = run_models(planner.chain.roles(checkpoint, "checkpoint"), str(checkpoint))
    models |= parse_models("--also", list(given["also"] or ()))
    held_out = Path(given["held_out"]) if given["held_out"] else None
    return planner.evaluate(models, _path(given, "results"), held_out, config, given["overwrite"])


def _plan_prune(context: typer.Context, planner: Planner) -> PlanRow:
    planner.prune(context.params["teacher"], Path(context.params["output"]), context.params["drop"])
    return _plan_without_cost(context, planner)


_PLANNED: dict[str, Callable[[typer.Context, Planner], PlanRow]] = {
    "generate": _plan_generate,
    "score": _plan_score,
    "train": _plan_train,
    "eval": _plan_eval,
    "prune": _plan_prune,
}


def _path(given: dict[str, Any], kind: str) -> Path:
    """The path of an artifact: as given, else in the run."""
    return Path(given[kind] or Path(given["run"]) / kind)


def _models(given: dict[str, Any], *roles: str) -> dict[str, str | None]:
    return {role: given[role] for role in roles}


def _prompts(given: dict[str, Any], config: GenerateConfig) -> Prompts:
    from tsdkd.stages.data.conversations import Conversations
    from tsdkd.stages.data.prompts import Prompts

    path = Path(given["prompts"] or defaults.PROMPTS)
    fields = (path, config.column, config.limit, config.system, config.config_name, config.split)
    if config.policy == GIVEN:
        return Conversations(*fields, response_column=config.response_column)
    return Prompts(*fields)
