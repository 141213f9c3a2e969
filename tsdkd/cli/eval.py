"""tsdkd eval"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsdkd.cli import defaults, options
from tsdkd.cli.console import ConsoleObserver, out
from tsdkd.cli.show_comparison import Format, show_comparison
from tsdkd.errors import InputError
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.types import EvalEngine
from tsdkd.stages.results import published
from tsdkd.stages.results.benchmarks import PAPER_BENCHMARKS, choose_benchmarks

if TYPE_CHECKING:
    from tsdkd.artifacts.reader import Artifact


def command(
    context: typer.Context,
    places: Annotated[
        list[Path] | None, typer.Argument(help="With --compare: results, or runs that have some.", show_default=False)
    ] = None,
    run: options.Run = options.RUN,
    tasks: Annotated[
        str,
        typer.Option(
            help=f"Of {', '.join(PAPER_BENCHMARKS)}, with commas between; a variant is NAME:VARIANT.",
            show_default="all: the paper's ten",
            rich_help_panel=options.METHOD,
        ),
    ] = ",".join(EvalConfig.tasks),
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=MODEL: measure these, and only these; as often as needed. MODEL is a directory (of an adapter, "
            "too), a hub id, embedded-teacher or embedded-student.",
            show_default="teacher, student and distilled of the run",
            rich_help_panel=options.MODELS,
        ),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(help="NAME=MODEL: measure this beside the run's three.", rich_help_panel=options.MODELS),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Local copies of the datasets: DATA/gsm8k, ...", show_default="the hub", rich_help_panel=options.DATA
        ),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            help="Run directory with held-out rollouts and scores: divergence to the teacher.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            help="Where results go, a folder a model.", show_default="RUN/results", rich_help_panel=options.DATA
        ),
    ] = None,
    checkpoint: options.Checkpoint = None,
    overwrite: options.Overwrite = False,
    limit: Annotated[int | None, options.count("Documents per benchmark.", options.METHOD)] = EvalConfig.limit,
    chat_template: Annotated[
        bool | None,
        typer.Option(
            help="Ask through the chat template.",
            show_default="where the model has one",
            rich_help_panel=options.METHOD,
        ),
    ] = EvalConfig.chat_template,
    max_new_tokens: Annotated[
        int | None, options.count("Cuts answers earlier.", options.METHOD, default="as the benchmarks do")
    ] = EvalConfig.max_new_tokens,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution",
            help="Let programs that a model writes run, confined: mbpp needs it.",
            rich_help_panel=options.MODELS,
        ),
    ] = False,
    engine: Annotated[EvalEngine, options.choice("Who answers.", options.ENGINE)] = EvalConfig.engine,
    tensor_parallel: Annotated[
        int, options.count("GPUs per model, with vLLM.", options.ENGINE)
    ] = EvalConfig.tensor_parallel,
    memory_fraction: Annotated[
        float, options.number("Of the GPU, for vLLM; without a GPU, of the machine.", options.ENGINE, least=0, most=1)
    ] = EvalConfig.memory_fraction,
    max_length: Annotated[
        int | None, options.count("Tokens of prompt and answer.", options.ENGINE, default="the model's context")
    ] = EvalConfig.max_length,
    batch_size: Annotated[
        int | None, options.count("Requests at a time.", options.ENGINE, default="as many as fit")
    ] = EvalConfig.batch_size,
    dtype: options.DTypeName = EvalConfig.dtype,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Measure nothing: put results side by side.", rich_help_panel=options.COMPARISON
        ),
    ] = False,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Whom the others are compared with.", show_default="student", rich_help_panel=options.COMPARISON
        ),
    ] = None,
    paper: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The published rows beside it: a pair such as qwen2.5, table-3, figure-4.",
            show_default="by the models' names",
            rich_help_panel=options.COMPARISON,
        ),
    ] = None,
    format_: Annotated[
        Format, typer.Option("--format", help="Of the tables.", rich_help_panel=options.COMPARISON)
    ] = "terminal",
) -> None:
    """Any models -> results: the paper's ten benchmarks through lm-eval, side by side.

    A finished benchmark is not run again. `tsdkd eval --compare A B` puts finished results or runs side by side.
    """
    if paper:
        published.find_table(paper)  # before anything is measured
    if compare:
        _compare(_found(places or [run]), baseline, paper, format_)
        return
    if places:
        raise InputError(f"{places[0]} is no option.", "Add --compare, or name models with --model NAME=MODEL.")
    config = configured(context)
    models = named("--model", model) if model else _of_run(checkpoint or run / "checkpoint")
    more = named("--also", also or [])
    for name in models.keys() & more.keys():
        raise InputError(f"--also {name} is already measured as {models[name]}.", "Choose another name.")
    models = {name: defaults.model(path) for name, path in (models | more).items()}

    from tsdkd.stages.eval.stage import evaluate
    from tsdkd.stages.models.paths import model_directory

    for path in models.values():
        model_directory(path)
    place = results or run / "results"
    artifacts = {
        name: evaluate(path, place / name, config, data, held_out, ConsoleObserver(), overwrite, allow_code_execution)
        for name, path in models.items()
    }
    _compare(artifacts, baseline, paper, format_)
    if format_ == "terminal":
        out.print(f"results: {place}", soft_wrap=True)


def configured(context: typer.Context) -> EvalConfig:
    names = context.params["tasks"].split(",")
    return options.configured(
        EvalConfig, context, tasks=tuple(benchmark.name for benchmark in choose_benchmarks(names))
    )


def named(option: str, models: list[str]) -> dict[str, str]:
    pairs = [entry.partition("=") for entry in models]
    for name, equals, path in pairs:
        if not (name and equals and path) or "/" in name:
            raise InputError(
                f"{option} {name}{equals}{path} is not NAME=MODEL, with a name that has no slash.",
                f"Write {option} NAME=MODEL, such as mine=runs/a/checkpoint.",
            )
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise InputError(f"{option} gives a name twice.", "Name every model once.")
    return {name: path for name, _, path in pairs}


def _of_run(checkpoint: Path) -> dict[str, str]:
    from tsdkd.artifacts.reader import read_artifact

    manifest = read_artifact(checkpoint, "checkpoint", "--checkpoint or --model NAME=MODEL", hashed=False).manifest
    named = {model.role: model.name for model in manifest.models}
    return {"teacher": named["teacher"], "student": named.get("student", str(checkpoint)), "distilled": str(checkpoint)}


def _compare(artifacts: dict[str, Artifact], baseline: str | None, paper: str | None, format_: Format) -> None:
    from tsdkd.stages.results.compare import compare

    show_comparison(compare(artifacts, baseline, paper), format_)


def _found(places: list[Path]) -> dict[str, Artifact]:
    """Results by the shortest names that tell them apart: of artifacts, or of all that a run has."""
    from tsdkd.artifacts.manifest import MANIFEST_FILE, load_manifest
    from tsdkd.artifacts.reader import read_artifact
    from tsdkd.stages.results.compare import model_sort_key, shorten_paths

    observer, found = ConsoleObserver(), []
    for place in places:
        below = [place, *sorted(place.glob("*/")), *sorted(place.glob("results/*/"))]
        there = [path for path in below if (path / MANIFEST_FILE).is_file() and load_manifest(path).kind == "results"]
        if not there:
            raise InputError(
                f"Found no results at {place}.", "Name the folder of results that `tsdkd eval` wrote, or their run."
            )
        finished = [path for path in there if load_manifest(path).state == "complete"]
        if finished:
            for path in sorted({*there} - {*finished}):
                observer.info(f"{path} is not finished: left out.")
        found += sorted(finished or there, key=model_sort_key)
    found = list({path.resolve(): path for path in found}.values())
    return {name: read_artifact(path, "results") for name, path in zip(shorten_paths(found), found, strict=True)}
