"""The command line: options -> config -> stage -> summary. Torch loads only inside a command that needs it."""

from tsdkd.cli import artifact, eval, generate, inspect, plan, prune, report, score, train
from tsdkd.cli.app import app

app.command("generate", rich_help_panel="Stages, in order")(generate.command)
app.command("score", rich_help_panel="Stages, in order")(score.command)
app.command("train", rich_help_panel="Stages, in order")(train.command)
app.command("eval", rich_help_panel="Stages, in order")(eval.command)
app.command("inspect", rich_help_panel="Around them")(inspect.command)
app.command("report", rich_help_panel="Around them")(report.command)
app.command("plan", rich_help_panel="Around them")(plan.command)
app.command("prune", rich_help_panel="Around them")(prune.command)
app.add_typer(artifact.app, name="artifact", rich_help_panel="Around them")


def main() -> None:
    app(prog_name="tsdkd")


__all__ = ["app", "main"]
