"""tsdkd inspect"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsdkd.cli import defaults, options
from tsdkd.cli.console import ConsoleObserver, show_text
from tsdkd.errors import InputError
from tsdkd.stages.config.groups import DATA, MODELS, RESPONSES
from tsdkd.stages.config.inspect import InspectConfig

if TYPE_CHECKING:
    from tsdkd.stages.inspect.response import InspectedResponse


@options.configured(InspectConfig)
def command(
    config: InspectConfig,
    run: options.Run = options.DEFAULT_RUN,
    scores: options.Scores = None,
    rollouts: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Rollouts artifact.", show_default="the scores' parent", rich_help_panel=DATA),
    ] = None,
    checkpoint: options.Checkpoint = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="HTML page to write.", rich_help_panel=options.COMMON),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(metavar="FROM-TO", help="Rows of the table to show, from 1.", rich_help_panel=RESPONSES),
    ] = None,
    aggregate: Annotated[
        bool, typer.Option("--aggregate", help="Show all responses together.", rich_help_panel=options.COMMON)
    ] = False,
    after: Annotated[str | None, options.model_option("Trained student to compare with.", "none")] = None,
    student: Annotated[
        str | None, options.model_option("Student: model directory or hub id.", "as recorded", MODELS)
    ] = None,
    teacher: Annotated[
        str | None,
        options.model_option("Teacher; both models read the response, instead of scores.", "scores are read", MODELS),
    ] = None,
) -> None:
    """Show one response token by token, or all responses together: entropies, ranks and selected tokens."""
    shown = _parse_positions(positions)
    options.require_page(html)
    if aggregate:
        _require_all_responses(config, after, teacher, student, rollouts, positions)
    from tsdkd.artifacts.disk import replace_text, translate_disk_errors
    from tsdkd.artifacts.reader import read_artifact
    from tsdkd.cli import show_inspection
    from tsdkd.stages.inspect import page
    from tsdkd.stages.inspect.stage import inspect_all

    scores_ = scores or run / "scores"
    if checkpoint:
        read_artifact(checkpoint, "checkpoint", hashed=False).require_parent(
            read_artifact(scores_, "scores", hashed=False)
        )
    trained = checkpoint or run / "checkpoint"
    if aggregate:
        overview = inspect_all(scores_, config, trained, ConsoleObserver())
        show_inspection.show_aggregate(overview)
        content = page.aggregate_page(overview, str(scores_)) if html else ""
    else:
        response = _response(run, scores, rollouts, trained, config, student, teacher, after)
        if shown and shown.start > len(response.tokens):
            raise InputError(f"The response has {len(response.tokens)} tokens.", "Give --positions within them.")
        show_inspection.show_response(response, shown)
        content = page.response_page(response) if html else ""
    if html is not None:
        with translate_disk_errors(html):
            replace_text(html, content)
        show_text(str(html))


def _require_all_responses(config: InspectConfig, *options_of_one: object) -> None:
    """Raises InputError for options that choose or compare one response."""
    if any(options_of_one) or config.sample_id != InspectConfig.sample_id:
        raise InputError(
            "--aggregate shows all responses of the scores.",
            "Leave out --sample-id, --positions, --after, --student, --teacher and --rollouts.",
        )


def _response(
    run: Path,
    scores: Path | None,
    rollouts: Path | None,
    checkpoint: Path,
    config: InspectConfig,
    student: str | None,
    teacher: str | None,
    after: str | None,
) -> InspectedResponse:
    from tsdkd.artifacts.reader import read_artifact
    from tsdkd.stages.inspect.stage import inspect_models, inspect_scores

    if teacher is None:
        return inspect_scores(scores or run / "scores", config, rollouts, checkpoint, student, after, ConsoleObserver())
    if scores:
        raise InputError("--teacher and --scores are both given.", "Give one of them.")
    rollouts = rollouts or run / "rollouts"
    recorded = read_artifact(rollouts, "rollouts", "--rollouts", hashed=False).manifest
    models = defaults.student(student, recorded), defaults.model(teacher)
    return inspect_models(rollouts, config, *models, after, ConsoleObserver())


def _parse_positions(value: str | None) -> range | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)-(\d+)", value)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--positions is {value!r}.", "Give the first and the last position, such as 1-40.")
    return range(int(match[1]), int(match[2]) + 1)
