"""tsdkd report"""

from pathlib import Path
from typing import Annotated

import typer

from tsdkd.cli import options
from tsdkd.cli.console import show_text


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Run directories; each round is one.", show_default=False),
    ],
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="HTML page to write.",
            show_default="report.html in the run; with several runs, beside the first",
        ),
    ] = None,
) -> None:
    """Write an HTML page about runs: settings, results, curves, responses, warnings, cost, lineage and commands.

    Partial runs are reported too. Several runs are shown side by side, their differences first.
    """
    options.require_page(html)

    from tsdkd.stages.report.stage import report

    show_text(str(report(runs, html)))
