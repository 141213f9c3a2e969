"""Writes docs/reference.md, every command with its options: `python -m tsdkd.cli.reference [--check]`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from tsdkd.cli.app import COMMANDS, app

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"
WRITTEN_BY = "python -m tsdkd.cli.reference"
_HEAD = f"""\
# Command reference

Written by `{WRITTEN_BY}` from the commands themselves: edit the options, not this page.

`generate`, `score`, `train`, `eval`, `prune`, `inspect` and `doctor` take `--config FILE`, a YAML file of options by name, such as `batch-size: 64`.
The command line wins over the environment, and both win over the file. A key that is no option, and a value that does not fit, are refused.
Every stage writes its options to `config.yaml` beside its artifact; `tsdkd artifact show DIR --config` prints them.

Every command takes `--help`. `tsdkd --debug COMMAND` shows tracebacks, `tsdkd --version` the version."""  # noqa: E501
_DEFAULT_GROUP = {"option": "Options", "argument": "Arguments"}


def render() -> str:
    """The command reference in Markdown, from the commands themselves."""
    lines = [_HEAD]
    for name in COMMANDS:
        command: Any = load_command(name)
        for subcommand, path in _leaves(command, name):
            lines += ["", f"## tsdkd {path}", "", *_paragraphs(subcommand.help)]
            lines += _tables(subcommand)
    return "\n".join(lines) + "\n"


def load_command(name: str) -> Any:
    """A command of tsdkd as the parser holds it."""
    root: Any = typer.main.get_command(app)
    return root.commands[name].load()


def _leaves(command: Any, path: str) -> Iterator[tuple[Any, str]]:
    subcommands = getattr(command, "commands", {})
    for name, subcommand in subcommands.items():
        yield from _leaves(subcommand, f"{path} {name}")
    if not subcommands:
        yield command, path


def _paragraphs(text: str) -> list[str]:
    """A docstring with a line for each paragraph."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n")).split("\n")


def _tables(command: Any) -> list[str]:
    groups: dict[str, list[Any]] = {}
    for parameter in command.params:
        group = getattr(parameter, "rich_help_panel", None) or _DEFAULT_GROUP[parameter.param_type_name]
        groups.setdefault(group, []).append(parameter)
    lines = []
    for group, parameters in groups.items():
        lines += ["", f"**{group}**", "", "| option | value | default | meaning |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(map(_escape, _cells(parameter)))} |" for parameter in parameters]
    return lines


def _cells(parameter: Any) -> tuple[str, str, str, str]:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar}`", "", "required" if parameter.required else "", parameter.help or ""
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    value = "" if parameter.is_flag else f"{parameter.metavar or ''}{_range(parameter)}"
    variable = f" Environment: `{parameter.envvar}`." if parameter.envvar else ""
    return names, value, _default(parameter), f"{parameter.help}{variable}"


def _range(parameter: Any) -> str:
    low, high = getattr(parameter, "min", None), getattr(parameter, "max", None)
    if low is None and high is None:
        return ""
    low, high = (f"{bound:g}" if isinstance(bound, float) else bound for bound in (low, high))
    return f", {low} to {high}" if None not in (low, high) else f", {low} or more"


def _default(parameter: Any) -> str:
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    if parameter.required:
        return "required"
    value = parameter.default
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value is None else str(value)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: list[str]) -> int:
    """Write the page; with --check, return 1 if it is stale."""
    text = render()
    if arguments == ["--check"]:
        stale = not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text
        if stale:
            typer.echo(f"{PAGE.name} is stale: run `{WRITTEN_BY}`.", err=True)
        return int(stale)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
