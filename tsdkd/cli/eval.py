"""tsdkd eval"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tsdkd.cli import options
from tsdkd.cli.console import Reporter, out, show_pairs, show_table
from tsdkd.errors import InputError
from tsdkd.stages.benchmarks import choose
from tsdkd.stages.config import Engine, EvalConfig

if TYPE_CHECKING:
    from tsdkd.artifacts import Artifact


def command(
    run: options.Run = options.RUN,
    tasks: Annotated[
        str, typer.Option(help="Benchmarks, with commas between.", rich_help_panel=options.METHOD)
    ] = ",".join(EvalConfig.tasks),
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=MODEL: measure these, and only these; as often as needed.",
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
            help="Local copies: DATA/<task>/<split>.parquet.", show_default="the hub", rich_help_panel=options.DATA
        ),
    ] = None,
    heldout: Annotated[
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
    limit: Annotated[int | None, options.count("Documents per task.", options.METHOD)] = EvalConfig.limit,
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
            help="Run the programs of mbpp's answers, confined.",
            rich_help_panel=options.METHOD,
        ),
    ] = False,
    engine: Annotated[Engine, options.choice("Who answers.", options.ENGINE)] = EvalConfig.engine,
    max_length: Annotated[
        int | None, options.count("Tokens of prompt and answer.", options.ENGINE, default="the model's context")
    ] = EvalConfig.max_length,
    batch_size: Annotated[
        int | None, options.count("Requests at a time.", options.ENGINE, default="as many as fit")
    ] = EvalConfig.batch_size,
    dtype: options.DTypeName = EvalConfig.dtype,
) -> None:
    """Any models -> results: benchmarks through lm-eval, and closeness to the teacher, side by side."""
    config = EvalConfig(
        tasks=tuple(benchmark.name for benchmark in choose(tasks.split(","))),
        limit=limit,
        chat_template=chat_template,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        engine=engine,
        batch_size=batch_size,
        dtype=dtype,
    )
    models = _named("--model", model) if model else _of_run(checkpoint or run / "checkpoint")
    more = _named("--also", also or [])
    for name in models.keys() & more.keys():
        raise InputError(f"--also {name} is already measured as {models[name]}.", "Choose another name.")
    models |= more

    from tsdkd.stages.eval import evaluate

    place = results or run / "results"
    artifacts = {
        name: evaluate(path, place / name, config, data, heldout, Reporter(), overwrite, allow_code_execution)
        for name, path in models.items()
    }
    _compare(artifacts, config.tasks, heldout is not None)
    out.print(f"results: {place}", soft_wrap=True)


def _named(option: str, models: list[str]) -> dict[str, str]:
    pairs = [entry.partition("=") for entry in models]
    for name, equals, path in pairs:
        if not (name and equals and path) or "/" in name:
            raise InputError(
                f"{option} {name}{equals}{path} names no model.",
                f"Write {option} NAME=MODEL, such as mine=runs/a/checkpoint.",
            )
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise InputError(f"{option} gives a name twice.", "Name every model once.")
    return {name: path for name, _, path in pairs}


def _of_run(checkpoint: Path) -> dict[str, str]:
    from tsdkd.artifacts import read

    manifest = read(checkpoint, "checkpoint", "--checkpoint or --model NAME=MODEL", hashed=False).manifest
    named = {model.role: model.name for model in manifest.models}
    return {"teacher": named["teacher"], "student": named.get("student", str(checkpoint)), "distilled": str(checkpoint)}


def _compare(artifacts: dict[str, Artifact], tasks: tuple[str, ...], closeness: bool) -> None:
    columns = ["model", *(f"{task} (%)" for task in tasks)]
    columns += ["KL to teacher", "top-1 agreement", "entropy"] if closeness else []
    rows = []
    for name, artifact in artifacts.items():
        found = artifact.manifest.summary
        row = [name, *(_percent(found[task]) for task in tasks)]
        if closeness:
            near = found["heldout"]
            row += [f"{near['kl']:.4f} ± {near['kl_stderr']:.4f}", f"{near['agreement']:.3f}", f"{near['entropy']:.3f}"]
        rows.append(row)
    show_table("accuracy ± standard error; nats per held-out token", columns, rows)
    if closeness:
        said = {name: artifact.manifest.summary["heldout"] for name, artifact in artifacts.items()}
        asked = next(iter(said.values()))["prompt"]
        show_pairs(
            "a held-out prompt, answered by all", [("prompt", asked), *((n, s["answer"]) for n, s in said.items())]
        )


def _percent(result: dict[str, Any]) -> str:
    error = "" if result["stderr"] is None else f" ± {100 * result['stderr']:.1f}"
    return f"{100 * result['value']:.1f}{error} (n={result['documents']})"
