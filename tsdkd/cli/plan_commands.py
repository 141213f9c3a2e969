"""Each command's options as a line of a plan; what is not planned takes nothing worth a number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tsdkd.cli import defaults, options, train, train_methods
from tsdkd.cli.eval import configured as eval_config
from tsdkd.cli.eval import named as models_named
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.config.score import ScoreConfig

if TYPE_CHECKING:
    from tsdkd.stages.data.prompts import Prompts
    from tsdkd.stages.plan.stage import Planner, PlanRow


def plan_command(line: typer.Context, lines: Planner) -> PlanRow:
    """Raises InputError for what the command would refuse."""
    return PLANNED.get(str(line.info_name), _free)(line, lines)


def _free(line: typer.Context, lines: Planner) -> PlanRow:
    from tsdkd.stages.plan.stage import PlanRow

    return PlanRow(str(line.info_name), "", None)


def _generate(line: typer.Context, lines: Planner) -> PlanRow:
    given, config = line.params, options.configured(GenerateConfig, line)
    roles = [role for role, others in (("student", "teacher"), ("teacher", "student")) if config.policy != others]
    output = _place(given, "rollouts")
    return lines.generate(_prompts(given, config), _named(given, *roles), output, config, given["overwrite"])


def _score(line: typer.Context, lines: Planner) -> PlanRow:
    given, config = line.params, options.configured(ScoreConfig, line)
    names = _named(given, "student", "teacher")
    return lines.score(_place(given, "rollouts"), names, _place(given, "scores"), config, given["overwrite"])


def _train(line: typer.Context, lines: Planner) -> PlanRow:
    given, config = line.params, train.configured(line)
    names, output = _named(given, "student", "teacher"), _place(given, "checkpoint")
    if config.online:
        rollouts = Path(given["rollouts"]) if given["rollouts"] else None
        prompts = _prompts(given, config.online.sampling)
        return lines.train(rollouts, None, prompts, names, output, config, given["overwrite"])
    told = Path(given["scores"]) if given["scores"] else None
    scores = train_methods.scores(config.method, told, Path(given["run"]))
    return lines.train(_place(given, "rollouts"), scores, None, names, output, config, given["overwrite"])


def _eval(line: typer.Context, lines: Planner) -> PlanRow:
    given = line.params
    if given["compare"]:
        return _free(line, lines)
    config, models = eval_config(line), models_named("--model", list(given["model"] or ()))
    if not models:
        checkpoint = _place(given, "checkpoint")
        roles = lines.chain.roles(checkpoint, "checkpoint")
        models = {
            "teacher": roles["teacher"],
            "student": roles.get("student", str(checkpoint)),
            "distilled": str(checkpoint),
        }
    models |= models_named("--also", list(given["also"] or ()))
    held_out = Path(given["held_out"]) if given["held_out"] else None
    return lines.evaluate(models, _place(given, "results"), held_out, config, given["overwrite"])


def _prune(line: typer.Context, lines: Planner) -> PlanRow:
    lines.prune(line.params["teacher"], Path(line.params["output"]), line.params["drop"])
    return _free(line, lines)


PLANNED: dict[str, Callable[[typer.Context, Planner], PlanRow]] = {
    "generate": _generate,
    "score": _score,
    "train": _train,
    "eval": _eval,
    "prune": _prune,
}


def _place(given: dict[str, Any], kind: str) -> Path:
    return Path(given[kind] or Path(given["run"]) / kind)


def _named(given: dict[str, Any], *roles: str) -> dict[str, str | None]:
    return {role: given[role] for role in roles}


def _prompts(given: dict[str, Any], config: GenerateConfig) -> Prompts:
    from tsdkd.stages.data.prompts import Prompts

    place = Path(given["prompts"] or defaults.PROMPTS)
    return Prompts(place, config.column, config.limit, config.system, config.config_name, config.split)
