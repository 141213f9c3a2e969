"""tsdkd eval"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsdkd.cli import defaults, options
from tsdkd.cli.console import ConsoleObserver, show_text
from tsdkd.cli.show_comparison import Format, show_comparison
from tsdkd.errors import InputError
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.groups import COMPARISON, DATA, MODELS
from tsdkd.stages.results import published
from tsdkd.stages.results.benchmarks import SUITES, choose_benchmarks

if TYPE_CHECKING:
    from tsdkd.artifacts.reader import Artifact


def read_eval_config(context: typer.Context) -> EvalConfig:
    """The configuration, with benchmarks by their full names. Raises InputError for an unknown benchmark."""
    config = options.read_config(context, EvalConfig)
    return replace(config, tasks=tuple(benchmark.name for benchmark in choose_benchmarks(config.tasks)))


Compared = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[DIR]...", help="With --compare: results, or runs with results.", show_default=False),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=MODEL",
        help="Model to measure instead of the run's, repeatable: model or adapter directory, hub id, "
        "embedded-teacher or embedded-student.",
        show_default="the run's teacher, student and distilled",
        rich_help_panel=options.COMMON,
    ),
]
MoreModels = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=MODEL", help="Model to measure besides the run's, repeatable.", rich_help_panel=MODELS),
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Local copies of the datasets: DIR/gsm8k, ...", show_default="the hub", rich_help_panel=DATA
    ),
]
HeldOutRun = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Run with rollouts and scores of held-out prompts; measures the divergence from the teacher.",
        rich_help_panel=options.COMMON,
    ),
]
Results = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Results, a directory for each model.", show_default="RUN/results", rich_help_panel=DATA
    ),
]
AllowCodeExecution = Annotated[
    bool,
    typer.Option(
        "--allow-code-execution",
        help="Run programs that models write, in a sandbox; mbpp needs it.",
        rich_help_panel=options.COMMON,
    ),
]
CompareOnly = Annotated[
    bool, typer.Option("--compare", help="Compare results without measuring.", rich_help_panel=options.COMMON)
]
Baselines = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Model that the others are compared with, repeatable.",
        show_default="student",
        rich_help_panel=COMPARISON,
    ),
]
Paper = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Published results to show: a pair such as qwen2.5, table-3 or figure-4.",
        show_default="by the models' names",
        rich_help_panel=COMPARISON,
    ),
]
TableFormat = Annotated[
    Format,
    typer.Option(
        "--format",
        metavar="NAME",
        help="Format of the tables. One of terminal, markdown, csv, latex.",
        rich_help_panel=COMPARISON,
    ),
]


@options.configured(EvalConfig, read_eval_config, choices={"tasks": chain(*SUITES.values())})
def command(
    config: EvalConfig,
    compared: Compared = None,
    run: options.Run = options.DEFAULT_RUN,
    model: Models = None,
    also: MoreModels = None,
    data: Data = None,
    held_out: HeldOutRun = None,
    results: Results = None,
    checkpoint: options.Checkpoint = None,
    overwrite: options.Overwrite = False,
    allow_code_execution: AllowCodeExecution = False,
    compare: CompareOnly = False,
    baseline: Baselines = None,
    paper: Paper = None,
    format_: TableFormat = "terminal",
) -> None:
    """Measure models on the paper's ten or other benchmarks, and compare them: checkpoint or any model -> results.

    A complete benchmark is skipped. `tsdkd eval --compare A B` compares complete results or runs.
    """
    if paper:
        published.find_table(paper)  # before anything is measured
    baselines: list[str | None] = [*baseline] if baseline else [None]
    if compare:
        from tsdkd.artifacts.locks import reading_inputs

        with reading_inputs():
            _compare(find_results(compared or [run]), baselines, paper, format_)
        return
    if compared:
        raise InputError(
            f"{compared[0]} is given without --compare.", "Add --compare, or name models with --model NAME=MODEL."
        )
    models = {
        name: defaults.model(path) for name, path in _models(model, also, checkpoint or run / "checkpoint").items()
    }

    from tsdkd.stages.eval.stage import evaluate, require_measurable
    from tsdkd.stages.results.compare import choose_baseline

    for name in baselines:
        choose_baseline(models, name)
    output = results or run / "results"
    for name, path in models.items():  # check all models before measuring one
        require_measurable(path, output / name, config, data, held_out, overwrite, allow_code_execution)
    artifacts = {
        name: evaluate(path, output / name, config, data, held_out, ConsoleObserver(), overwrite, allow_code_execution)
        for name, path in models.items()
    }
    _compare(artifacts, baselines, paper, format_)
    if format_ == "terminal":
        show_text(f"results: {output}")


def parse_models(option: str, models: list[str]) -> dict[str, str]:
    """Paths by name, from values such as mine=runs/a/checkpoint. Raises InputError."""
    pairs = [entry.partition("=") for entry in models]
    for name, equals, path in pairs:
        if not (name and equals and path and name.isprintable()) or "/" in name or name[0] == "." or len(name) > 60:
            raise InputError(
                f"{option} {name + equals + path!r} is not NAME=MODEL, with a name of at most 60 printable "
                "characters that has no slash and no dot in front.",
                f"Write {option} NAME=MODEL, such as mine=runs/a/checkpoint.",
            )
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise InputError(f"{option} gives a name twice.", "Give every model its own name.")
    return {name: path for name, _, path in pairs}


def _models(model: list[str] | None, also: list[str] | None, checkpoint: Path) -> dict[str, str]:
    models = parse_models("--model", model) if model else _run_models(checkpoint)
    more = parse_models("--also", also or [])
    for name in models.keys() & more.keys():
        raise InputError(f"--also {name} is already measured as {models[name]}.", "Choose another name.")
    return models | more


def _run_models(checkpoint: Path) -> dict[str, str]:
    from tsdkd.artifacts.reader import read_artifact
    from tsdkd.stages.results.model_names import run_models

    manifest = read_artifact(checkpoint, "checkpoint", "--checkpoint or --model NAME=MODEL", hashed=False).manifest
    return run_models({model.role: model.name for model in manifest.models}, str(checkpoint))


def _compare(artifacts: dict[str, Artifact], baselines: list[str | None], paper: str | None, format_: Format) -> None:
    from tsdkd.stages.results.compare import compare

    show_comparison([compare(artifacts, baseline, paper) for baseline in baselines], format_)


def find_results(paths: list[Path]) -> dict[str, Artifact]:
    """Results of artifacts or runs, by the shortest distinct names. Raises InputError."""
    from tsdkd.artifacts.files import MANIFEST_FILE
    from tsdkd.artifacts.manifest import load_manifest
    from tsdkd.artifacts.reader import read_artifact
    from tsdkd.stages.results.model_names import model_sort_key, shorten_paths

    observer, selected = ConsoleObserver(), []
    for path in paths:
        below = [path, *sorted(path.glob("[!.]*/")), *sorted(path.glob("results/[!.]*/"))]
        results = [file for file in below if (file / MANIFEST_FILE).is_file() and load_manifest(file).kind == "results"]
        if not results:
            raise InputError(
                f"Found no results at {path}.", "Name the directory of results that `tsdkd eval` wrote, or its run."
            )
        complete = [file for file in results if load_manifest(file).state == "complete"]
        if complete:
            for file in sorted({*results} - {*complete}):
                observer.info(f"{file} is incomplete: skipped.")
        selected += sorted(complete or results, key=model_sort_key)
    selected = list({path.resolve(): path for path in selected}.values())
    return {name: read_artifact(path, "results") for name, path in zip(shorten_paths(selected), selected, strict=True)}
