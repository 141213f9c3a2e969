"""The commands of a plan: each stage's options as a row of the table; other commands cost nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tsdkd.artifacts.manifest import teacher_name, teacher_role
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
    student = {} if config.policy == "teacher" else {"student": given["student"]}
    needs_teacher = config.policy not in {"student", GIVEN} or given["teacher"]
    teachers = _teachers(given, config.teacher_by, {}) if needs_teacher else {}
    output, prompts = _path(given, "rollouts"), _prompts(given, config, teachers)
    return planner.generate(prompts, student | teachers, output, config, given["overwrite"])


def _plan_score(context: typer.Context, planner: Planner) -> PlanRow:
    given, config = context.params, options.read_config(context, ScoreConfig)
    rollouts = _path(given, "rollouts")
    recorded = planner.chain.roles(rollouts, "rollouts")
    teachers = _teachers(given, config.teacher_by or planner.chain.teacher_by(rollouts), recorded)
    models = {"student": given["student"]} | teachers
    return planner.score(rollouts, models, _path(given, "scores"), config, given["overwrite"])


def _plan_train(context: typer.Context, planner: Planner) -> PlanRow:
    given, config = context.params, read_train_config(context)
    student, output = {"student": given["student"]}, _path(given, "checkpoint")
    if config.online:
        rollouts, column = Path(given["rollouts"]) if given["rollouts"] else None, config.online.sampling.teacher_by
        if rollouts:
            recorded = planner.chain.roles(rollouts, "rollouts")
            teachers = _teachers(given, column or planner.chain.teacher_by(rollouts), recorded)
        else:
            teachers = _teachers(given, column, {})
        prompts = _prompts(given, config.online.sampling, teachers)
        return planner.train(rollouts, None, prompts, student | teachers, output, config, given["overwrite"])
    rollouts = _path(given, "rollouts")
    scores = scores_path(config, Path(given["scores"]) if given["scores"] else None, Path(given["run"]))
    recorded = planner.chain.roles(scores, "scores") if scores else planner.chain.roles(rollouts, "rollouts")
    teachers = _teachers(given, None, recorded)
    return planner.train(rollouts, scores, None, student | teachers, output, config, given["overwrite"])


def _plan_eval(context: typer.Context, planner: Planner) -> PlanRow:
    from tsdkd.stages.results.model_names import run_models

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


def _teachers(given: dict[str, Any], teacher_by: str | None, recorded: Mapping[str, str]) -> dict[str, str | None]:
    """The teachers by role: as given, else those among the recorded roles; None for an only teacher without a name."""
    by_name = {name: model for role, model in recorded.items() if (name := teacher_name(role)) is not None}
    named = defaults.named_teachers(list(given["teacher"] or ()), teacher_by, by_name)
    return {teacher_role(name): model for name, model in named.items()} or {"teacher": None}


def _prompts(given: dict[str, Any], config: GenerateConfig, teachers: Iterable[str]) -> Prompts:
    """`teachers`: roles of the teachers that prompts may name."""
    from tsdkd.stages.data.conversations import Conversations
    from tsdkd.stages.data.prompts import Prompts

    path = Path(given["prompts"] or defaults.PROMPTS)
    fields = (path, config.column, config.limit, config.system, config.config_name, config.split, config.teacher_by)
    if config.policy == GIVEN:
        return Conversations(*fields, response_column=config.response_column)
    return Prompts(*fields, [name for role in teachers if (name := teacher_name(role))])
