"""tsdkd inspect"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsdkd.cli import defaults, options
from tsdkd.cli.console import ConsoleObserver, show_text
from tsdkd.core.config import TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.config.inspect import InspectConfig

if TYPE_CHECKING:
    from tsdkd.stages.inspect.response import InspectedResponse

SHOWN = "What is shown"
TRAINED = "the checkpoint's, else {}"


def command(
    run: options.Run = options.RUN,
    scores: options.Scores = None,
    rollouts: Annotated[
        Path | None,
        typer.Option(help="Rollouts artifact.", show_default="as the scores recorded it", rich_help_panel=options.DATA),
    ] = None,
    checkpoint: options.Checkpoint = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page.", rich_help_panel=options.DATA)
    ] = None,
    sample_id: Annotated[
        str,
        typer.Option(metavar="ID", help="Or random, largest-gap or longest-opener.", rich_help_panel=SHOWN),
    ] = InspectConfig.sample_id,
    seed: Annotated[int, options.count("Of the random choice.", SHOWN, least=0)] = InspectConfig.seed,
    positions: Annotated[
        str | None, typer.Option(metavar="FROM-TO", help="Rows of the table, from 1.", rich_help_panel=SHOWN)
    ] = None,
    aggregate: Annotated[
        bool, typer.Option("--aggregate", help="All responses in place of one.", rich_help_panel=SHOWN)
    ] = False,
    after: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Compare: what this one sees.", rich_help_panel=options.MODELS),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(help="Model directory or hub id.", show_default="as recorded", rich_help_panel=options.MODELS),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Both models read, in place of scores.", show_default="scores are used", rich_help_panel=options.MODELS
        ),
    ] = None,
    opener: Annotated[
        str | None,
        typer.Option(
            metavar="X",
            help="Share of entropy in the opener, or adaptive.",
            show_default=TRAINED.format(TSDKDConfig.opener),
            rich_help_panel=options.OBJECTIVE,
        ),
    ] = None,
    em_ratio: Annotated[
        float | None,
        options.number(
            "Share of positions whose entropy falls.",
            options.OBJECTIVE,
            default=TRAINED.format(TSDKDConfig.em_ratio),
        ),
    ] = None,
    gate: Annotated[
        bool | None,
        options.choice("Weigh the divergence by the gap.", options.OBJECTIVE, default=TRAINED.format("on")),
    ] = None,
    tau: Annotated[
        float | None,
        options.number("Sharpness of the gate.", options.OBJECTIVE, default=TRAINED.format(TSDKDConfig.tau)),
    ] = None,
    k: Annotated[
        int | None,
        options.count("Candidates ranked.", options.OBJECTIVE, least=2, default=TRAINED.format(TSDKDConfig.k)),
    ] = None,
) -> None:
    """Look at one response token by token, or at a whole artifact: what is taught, and what both models see."""
    wanted = _positions(positions)
    options.require_page(html)
    if aggregate and (after or teacher or student or rollouts or positions or sample_id != InspectConfig.sample_id):
        raise InputError(
            "--aggregate shows what scores hold, all of it.",
            "Leave out --sample-id, --positions, --after, --student, --teacher and --rollouts.",
        )
    config = InspectConfig(
        sample_id=sample_id,
        seed=seed,
        opener=None if opener is None else options.opener_share(opener),
        em_ratio=em_ratio,
        gate=gate,
        tau=tau,
        k=k,
    )
    from tsdkd.artifacts.reader import read_artifact
    from tsdkd.cli import show_inspection
    from tsdkd.stages.inspect import page
    from tsdkd.stages.inspect.stage import inspect_all

    if checkpoint:
        read_artifact(checkpoint, "checkpoint", hashed=False).require_parent(
            read_artifact(scores or run / "scores", "scores", hashed=False)
        )
    trained = checkpoint or run / "checkpoint"
    if aggregate:
        found = inspect_all(scores or run / "scores", config, trained, ConsoleObserver())
        show_inspection.show_aggregate(found)
        written = page.aggregate_page(found, str(scores or run / "scores")) if html else ""
    else:
        response = _response(run, scores, rollouts, trained, config, student, teacher, after)
        if wanted and wanted.start > len(response.tokens):
            raise InputError(f"The response has {len(response.tokens)} tokens.", "Give --positions within them.")
        show_inspection.show_response(response, wanted)
        written = page.response_page(response) if html else ""
    if html is not None:
        html.write_text(written, encoding="utf-8")
        show_text(str(html))


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
        raise InputError("--teacher reads in place of --scores.", "Leave one of them out.")
    answered = rollouts or run / "rollouts"
    author = read_artifact(answered, "rollouts", "--rollouts", hashed=False).manifest
    return inspect_models(answered, config, defaults.student(student, author), defaults.model(teacher), after)


def _positions(value: str | None) -> range | None:
    if value is None:
        return None
    found = re.fullmatch(r"(\d+)-(\d+)", value)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(f"--positions is {value!r}.", "Give the first and the last, such as 1-40.")
    return range(int(found[1]), int(found[2]) + 1)
