"""tsdkd report"""

from pathlib import Path
from typing import Annotated

import typer

from tsdkd.cli import options
from tsdkd.cli.console import show_text


def command(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories; rounds of one count singly.", show_default=False)
    ],
    html: Annotated[
        Path | None,
        typer.Option(help="The page.", show_default="RUN/report.html; of several runs, beside the first"),
    ] = None,
) -> None:
    """Runs -> one page: settings, results, curves, answers before and after, warnings, cost, lineage, commands.

    Unfinished runs, too. Several runs stand side by side, what differs between them first.
    """
    options.require_page(html)

    from tsdkd.stages.report.stage import report

    show_text(str(report(runs, html)))
