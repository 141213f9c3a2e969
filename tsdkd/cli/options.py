"""Options for typer: those of a configuration, made from its fields, and those of several commands."""

import inspect
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import typer
from typer.models import OptionInfo

from tsdkd.artifacts.manifest import MAX_TEACHER_NAME, is_teacher_name
from tsdkd.cli.config_file import config_file_parameter
from tsdkd.errors import InputError
from tsdkd.stages.config.chat import ChatConfig
from tsdkd.stages.config.groups import COMMON, DATA, GROUPS
from tsdkd.stages.config.option import ConfigOption, build, config_options, union_members

DEFAULT_RUN = Path("runs/default")
_LAST = {"seed", "overwrite", "config_file"}
"""Common options that help shows after the others."""

Run = Annotated[
    Path,
    typer.Option(
        "--run",
        envvar="TSDKD_RUN",
        metavar="DIR",
        help="Run directory, with rollouts/, scores/, checkpoint/ and results/.",
        rich_help_panel=COMMON,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace an existing output when the new one is complete.", rich_help_panel=COMMON
    ),
]
Rollouts = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Rollouts artifact.", show_default="RUN/rollouts", rich_help_panel=DATA),
]
Scores = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Scores artifact.", show_default="RUN/scores", rich_help_panel=DATA)
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Checkpoint artifact.", show_default="RUN/checkpoint", rich_help_panel=DATA),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        metavar="DATA",
        help="JSONL, JSON, CSV or Parquet file; or a dataset: hub id or directory.",
        show_default="the embedded prompts",
        rich_help_panel=COMMON,
    ),
]


def model_option(help_: str, default: str, group: str = COMMON) -> Any:
    """An option that names a model; `default`: in words."""
    return typer.Option(metavar="MODEL", help=help_, show_default=default, rich_help_panel=group)


Student = Annotated[
    str | None, model_option("Student: model directory or hub id.", "as recorded, else embedded-student")
]
Teachers = Annotated[
    list[str] | None,
    model_option(
        "Teacher: model directory or hub id. Several: NAME=MODEL for each, and --teacher-by.",
        "as recorded, else embedded-teacher",
    ),
]
TeacherUrls = Annotated[
    list[str] | None,
    typer.Option(
        "--teacher-url",
        metavar="URL",
        help="vLLM or SGLang server that serves the teacher; --teacher is then the model's name there. Several: "
        "NAME=URL for each, and --teacher-by.",
        rich_help_panel=COMMON,
    ),
]
FirstStudent = Annotated[str | None, model_option("Student: model directory or hub id.", "embedded-student")]
FirstTeacher = Annotated[str | None, model_option("Teacher: model directory or hub id.", "embedded-teacher")]
FirstTeachers = Annotated[
    list[str] | None,
    model_option(
        "Teacher: model directory or hub id. Several: NAME=MODEL for each, and --teacher-by.", "embedded-teacher"
    ),
]
"""Of commands that read no artifact, so that none has recorded a model."""
Seed = Annotated[
    int, typer.Option(min=0, max=2**32 - 1, metavar="N", help="Seed of sampling and order.", rich_help_panel=COMMON)
]

Config = TypeVar("Config")
Command = Callable[..., None]


def read_config(context: typer.Context, kind: type[Config]) -> Config:
    """A configuration from a command's options. Raises InputError."""
    config: Config = build(kind, option_values(context, kind))
    return config


def option_values(context: typer.Context, kind: type, *, given: bool = False, prefix: str = "") -> dict[str, Any]:
    """The values of a configuration's options by dotted key. Raises InputError.

    `given`: only options on the command line or in the --config file. `prefix`: only keys with this prefix, which is
    removed.
    """
    return {
        option.key.removeprefix(prefix): option.parse(context.params[option.parameter])
        for option in config_options(kind)
        if option.key.startswith(prefix) and (not given or is_given(context, option.parameter))
    }


def is_given(context: typer.Context, parameter: str) -> bool:
    """Whether the option is given, on the command line or in the --config file."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name in {"COMMANDLINE", "DEFAULT_MAP"}


def configured(
    kind: type[Config],
    read: Callable[[typer.Context], Config] | None = None,
    choices: Mapping[str, Iterable[str]] = MappingProxyType({}),
) -> Callable[[Command], Command]:
    """Give a command the options of a configuration; it receives the finished configuration as `config`.

    Adds --config, and orders the options as help shows them. `read`: makes the configuration from the options;
    `choices`: words to choose from, by option name, where the option's type does not list them.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [parameter for name, parameter in signature.parameters.items() if name != "config"]

        def call(context: typer.Context, **values: Any) -> None:
            config = read(context) if read else read_config(context, kind)
            command(config=config, **{parameter.name: values[parameter.name] for parameter in own})

        options = [
            *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own),
            *(typer_parameter(option, choices.get(option.name, option.choices)) for option in config_options(kind)),
        ]
        context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters = [context, *sorted([config_file_parameter(options), *options], key=_group_rank)]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        call.__name__, call.__doc__, call.__module__ = command.__name__, command.__doc__, command.__module__
        return call

    return decorate


def typer_parameter(option: ConfigOption, choices: Iterable[str]) -> inspect.Parameter:
    """The parameter of a command for an option; its help lists the `choices`."""
    info = option.option
    names = [f"--{option.name}"]
    type_, default, metavar = option.type, option.default, info.metavar
    if option.is_tuple:
        type_, default = (list[str] if info.repeatable else str) | None, ",".join(default) or None
    elif option.is_number_or_word:
        type_, default = (str if default is not None else str | None), default if default is None else str(default)
    elif bool in union_members(type_) and default is not False:
        names = [f"--{option.name}/--no-{option.name}"]
    declared = typer.Option(
        *names,
        min=info.min,
        max=info.max,
        metavar=metavar or _metavar(option),
        help=f"{info.help} One of {listed}." if (listed := ", ".join(choices)) else info.help,
        show_default=info.shown or True,
        rich_help_panel=option.group,
    )
    return inspect.Parameter(
        option.parameter, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[type_, declared]
    )


def _metavar(option: ConfigOption) -> str | None:
    if option.choices:
        return "NAME"
    members = union_members(option.type)
    return next((word for type_, word in ((int, "N"), (float, "X"), (str, "TEXT")) if type_ in members), None)


def _group_rank(parameter: inspect.Parameter) -> int:
    """Arguments and common options come first."""
    declared = next(iter(getattr(parameter.annotation, "__metadata__", ())), None)
    if not isinstance(declared, OptionInfo) or declared.rich_help_panel == COMMON:
        return -1 if parameter.name in _LAST else -2
    return GROUPS.index(str(declared.rich_help_panel))


def parse_teachers(option: str, values: list[str] | None, teacher_by: str | None) -> dict[str, str]:
    """The model or address of each teacher, in the order of names; the name of an only one is "". Empty without values.

    `teacher_by`: the column that names the teacher of each prompt, as given or recorded.
    Raises InputError for several values that are not NAME=MODEL, for a name that is given twice, and for several
    teachers without a column.
    """
    if not values:
        return {}
    if len(values) == 1 and teacher_by is None:
        return {"": values[0]}
    kind, example = ("URL", "http://host:8000") if option == "--teacher-url" else ("MODEL", "models/a")
    pairs = [value.partition("=") for value in values]
    for name, equals, model in pairs:
        if not (is_teacher_name(name) and equals and model):
            raise InputError(
                f"{option} {name + equals + model!r} is not NAME={kind}, with a printable name of at most "
                f"{MAX_TEACHER_NAME} characters.",
                f"Write {option} NAME={kind} for each teacher, such as math={example}.",
            )
    names = [name for name, _, _ in pairs]
    if len({*names}) < len(names):
        raise InputError(f"{option} gives a name twice.", "Give every teacher its own name.")
    if teacher_by is None:
        raise InputError(
            "Several teachers are given, and no column names the teacher of each prompt.",
            "Add --teacher-by COLUMN, such as --teacher-by source.",
        )
    return {name: model for name, _, model in sorted(pairs)}


def parse_served(
    urls: list[str], names: list[str] | None, teacher_by: str | None
) -> tuple[dict[str, str], dict[str, str]]:
    """The servers' addresses and the models' names there, by teacher. Raises InputError as `parse_teachers`, and for
    a teacher without a server."""
    at, served = (
        parse_teachers(option, values, teacher_by) for option, values in (("--teacher-url", urls), ("--teacher", names))
    )
    if alone := ", ".join(name for name in served if name not in at):
        raise InputError(
            f"No --teacher-url is given for {alone}: either all teachers are served, or all are loaded.",
            "Give --teacher-url for each teacher, or for none.",
        )
    return at, served


def require_page(html: Path | None) -> None:
    """Raise InputError unless `html` names an .html file that can be written; no other file is ever replaced."""
    if html is None:
        return
    from tsdkd.artifacts.disk import temporary_path

    try:
        if html.suffix != ".html" or (html.exists() and not html.is_file()):
            raise InputError(f"{html} does not name a page.", "Name a file that ends in .html.")
        if not html.absolute().parent.is_dir():
            raise InputError(
                f"The directory {html.parent} of the page does not exist.", "Create it, or name another --html FILE."
            )
        temporary_path(html).touch()
        temporary_path(html).unlink()
    except OSError as error:
        raise InputError(
            f"The page {html} cannot be written ({error.strerror}).", "Name another --html FILE."
        ) from None


def run_option(run: Path) -> str:
    """The option by which the next command names this run."""
    return "" if run == DEFAULT_RUN else f" --run {shlex.quote(str(run))}"


def path_option(option: str, path: Path | None) -> str:
    """The option by which the next command names an artifact that is not at its default path."""
    return "" if path is None else f" {option} {shlex.quote(str(path))}"


def chat_options(chat: ChatConfig) -> str:
    """The options by which the next command has this chat format."""
    options = (("--chat-template", chat.template), ("--chat-template-kwargs", chat.kwargs))
    return "".join(f" {option} {shlex.quote(value)}" for option, value in options if value)
