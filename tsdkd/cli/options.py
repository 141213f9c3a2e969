"""Options that several commands share, worded once."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from tsdkd.errors import InputError
from tsdkd.stages.config.types import DType

MODELS = "Models"
DATA = "Inputs and outputs"
METHOD = "Method"
ENGINE = "Engine"
VLLM = "vLLM"
COMPARISON = "Comparison"
OBJECTIVE = "Objective (the paper's symbols)"


def count(help_: str, panel: str, least: int = 1, default: str | bool = True) -> Any:
    """An option that takes a whole number; short names leave room for long ones on 80 columns."""
    return typer.Option(min=least, metavar="N", help=help_, rich_help_panel=panel, show_default=default)


def number(
    help_: str,
    panel: str,
    least: float | None = None,
    most: float | None = None,
    name: str = "",
    default: str | bool = True,
) -> Any:
    """An option that takes a real number; `name` where Python cannot have it as a parameter."""
    names = [name] if name else []
    return typer.Option(
        *names, min=least, max=most, metavar="X", help=help_, rich_help_panel=panel, show_default=default
    )


def text(help_: str, panel: str, default: str) -> Any:
    """An option that takes words; `default` is what stands where none are given."""
    return typer.Option(metavar="TEXT", help=help_, show_default=default, rich_help_panel=panel)


def choice(help_: str, panel: str, default: str | bool = True) -> Any:
    """An option that takes one of a few words, or a switch."""
    return typer.Option(help=help_, rich_help_panel=panel, show_default=default)


Run = Annotated[
    Path,
    typer.Option(
        "--run",
        envvar="TSDKD_RUN",
        help="Run directory: rollouts/, scores/, checkpoint/, results/.",
        rich_help_panel=DATA,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace an output that was made with another configuration.", rich_help_panel=DATA
    ),
]
Rollouts = Annotated[
    Path | None, typer.Option(help="Rollouts artifact.", show_default="RUN/rollouts", rich_help_panel=DATA)
]
Scores = Annotated[Path | None, typer.Option(help="Scores artifact.", show_default="RUN/scores", rich_help_panel=DATA)]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Checkpoint artifact.", show_default="RUN/checkpoint", rich_help_panel=DATA)
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help="JSONL, JSON, CSV or Parquet file; or a dataset, by hub id or directory.",
        show_default="the embedded prompts",
        rich_help_panel=DATA,
    ),
]
Column = Annotated[
    str | None,
    typer.Option(help="Column with messages or text.", show_default="messages, else prompt", rich_help_panel=DATA),
]
Student = Annotated[
    str | None,
    typer.Option(
        help="Model directory or hub id.", show_default="as recorded, else the embedded student", rich_help_panel=MODELS
    ),
]
Teacher = Annotated[
    str | None,
    typer.Option(help="Model directory or hub id.", show_default="the embedded teacher", rich_help_panel=MODELS),
]
Seed = Annotated[int, count("Fixes sampling and order.", ENGINE, least=0)]
DTypeName = Annotated[
    DType, typer.Option("--dtype", help="auto: as saved; float32 on a CPU without bf16.", rich_help_panel=ENGINE)
]

RUN = Path("runs/default")
Config = TypeVar("Config")


def configured(kind: type[Config], context: typer.Context, **others: Any) -> Config:
    """A config whose fields are what the options of their names say, but for `others`. Raises InputError."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in context.params.items() if name in names} | others)


def require_page(html: Path | None) -> None:
    """Raise InputError unless a page can be written there; nothing but a page is ever replaced."""
    if html is None:
        return
    if html.suffix != ".html" or html.is_dir():
        raise InputError(f"{html} would be no page.", "Name a file that ends in .html.")
    if not html.absolute().parent.is_dir():
        raise InputError(f"There is no folder {html.parent} for the page.", "Make it, or name another --html FILE.")


def opener_share(value: str) -> float | Literal["adaptive"]:
    """What --opener says."""
    if value == "adaptive":
        return "adaptive"
    try:
        return float(value)
    except ValueError:
        raise InputError(f"--opener is {value!r}.", "Give a share such as 0.1, or adaptive.") from None


def at(run: Path) -> str:
    """How the next command names this run."""
    return "" if run == RUN else f" --run {run}"


def named(option: str, path: Path | None) -> str:
    """How the next command names an artifact that is not where the run has it."""
    return "" if path is None else f" {option} {path}"
