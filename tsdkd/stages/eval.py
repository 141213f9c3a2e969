"""eval: any model -> results. Benchmarks through lm-eval, and closeness to the teacher on held-out responses.

Every benchmark becomes one part with its samples; a finished one is not run again.
"""

import json
import os
import time
from contextlib import closing
from dataclasses import asdict, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa

from tsdkd.artifacts import (
    MANIFEST,
    SCHEMAS,
    Artifact,
    Manifest,
    Parent,
    content_digest,
    load_manifest,
    relative,
)
from tsdkd.errors import InputError
from tsdkd.stages.config import EvalConfig
from tsdkd.stages.evaluation import harness
from tsdkd.stages.evaluation.benchmarks import BENCHMARKS, Benchmark, choose
from tsdkd.stages.models import (
    LanguageModel,
    describe,
    libraries,
    load_model,
    load_tokenizer,
    require_same_tokenizer,
)
from tsdkd.stages.reporter import Reporter, Silent
from tsdkd.stages.samples.heldout import HeldOut, answer, measure, require_hidden
from tsdkd.stages.samples.staged import StagedSamples
from tsdkd.writer import Writer

HELDOUT_FILE = "heldout.json"
ROWS = " rows"
"""Ends the kind of parents that are copies of benchmarks."""


def evaluate(
    model: str,
    output: Path,
    config: EvalConfig,
    data: Path | None = None,
    heldout: Path | None = None,
    reporter: Reporter | None = None,
    overwrite: bool = False,
    allow_code_execution: bool = False,
) -> Artifact:
    """Measure one model. `data`: local benchmark folders; `heldout`: a run directory with rollouts and scores.

    Benchmarks are added to results that are there. The results' last folder is what the model is called.

    Raises InputError before anything is written and before the first answer.
    """
    reporter = reporter or Silent()
    benchmarks = choose(config.tasks)
    _require_engine(config)
    harness.require(benchmarks, data, allow_code_execution)
    chat = _uses_chat_template(model, config)
    samples = None if heldout is None else StagedSamples(heldout / "rollouts", heldout / "scores")
    before = None if overwrite else _finished(output)
    manifest = _manifest(model, output, config, benchmarks, data, samples, before)
    with (
        Writer.open(output, manifest, overwrite=overwrite, grows=_grows(before)) as writer,
        reporter.writing(output),
        closing(_Loaded(model, config)) as loaded,
    ):
        if writer.complete:
            reporter.say(f"{output} is complete: nothing to do.")
            return writer.artifact
        left = [benchmark for benchmark in benchmarks if not writer.has(f"{benchmark.key}.json")]
        tasks = {one.name: harness.load(one, data, config.max_new_tokens) for one in left}
        if samples is not None and not writer.has(HELDOUT_FILE):
            with reporter.progress("held-out responses read", len(samples), "responses") as advance:
                closeness = measure(
                    loaded.whole,
                    loaded.whole.head,
                    HeldOut(samples, range(len(samples))),
                    (config.batch_size or 16) * 512,
                    advance,
                )
            _write(writer, HELDOUT_FILE, closeness | answer(loaded.whole, samples))
        if left:
            _require_room(left, config, loaded.answering.max_length)
            how = "through its chat template" if chat else "without a chat template"
            reporter.say(f"{output.name} is {model}, asked {how}.")
        for benchmark in left:
            started = time.monotonic()
            asked = output.name, benchmark, tasks[benchmark.name], config.limit, chat
            try:
                rows = harness.ask(loaded.answering, *asked, reporter)
            except KeyboardInterrupt:
                reporter.say(f"{output.name}: {benchmark.name} will begin again; what was finished before it is kept.")
                raise
            result = _result(benchmark, rows) | {"chat_template": chat}
            writer.write_table(f"{benchmark.key}.parquet", pa.Table.from_pylist(rows, SCHEMAS["results"]))
            _write(writer, f"{benchmark.key}.json", result)
            reporter.say(f"{output.name}: {_said(benchmark, result)}, {time.monotonic() - started:,.0f} s")
        files = {benchmark.name: f"{benchmark.key}.json" for benchmark in choose(manifest.config["tasks"])}
        files |= {"heldout": HELDOUT_FILE} if samples is not None else {}
        return writer.finish({name: json.loads((output / file).read_text()) for name, file in files.items()})


def _manifest(
    model: str,
    output: Path,
    config: EvalConfig,
    benchmarks: list[Benchmark],
    data: Path | None,
    samples: StagedSamples | None,
    before: Manifest | None,
) -> Manifest:
    """`before`: results that are there, whose benchmarks stay."""
    record = describe("evaluated", model)
    copies = dict.fromkeys(copy for benchmark in benchmarks if (copy := benchmark.rows(data)))
    parents = [Parent(f"{copy.name}{ROWS}", content_digest(copy), relative(copy, output)) for copy in copies]
    tasks = {benchmark.name for benchmark in benchmarks}
    if before:
        known = {parent.kind for parent in parents}
        parents += [parent for parent in before.parents if parent.kind.endswith(ROWS) and parent.kind not in known]
        tasks |= set(before.config["tasks"])
    settings = {name: value for name, value in asdict(config).items() if name != "memory_fraction"}
    if samples is not None:
        require_hidden(samples)
        require_same_tokenizer(record, samples.scores.manifest.model("teacher"))
        parents += [samples.scores.as_parent_of(output)]
    return Manifest(
        kind="results",
        config=settings | {"tasks": [benchmark.name for benchmark in choose(tasks)]},
        seed=0,
        parents=tuple(parents),
        models=(record,),
        engine=f"lm-eval 0.4.13 on {config.engine}",
        libraries=libraries(),
    )


def _finished(output: Path) -> Manifest | None:
    """The results that are there, with the benchmarks that were finished."""
    if not (output / MANIFEST).is_file():
        return None
    found = load_manifest(output)
    if found.kind != "results":
        return None
    files = {part.file for part in found.parts}
    tasks = [one.name for one in choose(found.config["tasks"]) if f"{one.key}.json" in files]
    kept = {f"{rows.name}{ROWS}" for one in choose(tasks) if (rows := one.rows(Path()))}
    return replace(
        found,
        config=found.config | {"tasks": tasks},
        parents=tuple(parent for parent in found.parents if parent.kind in kept),
    )


def _grows(before: Manifest | None) -> set[str]:
    """What of the identity benchmarks that are added may change: not the rows of those that stay."""
    kept = {parent.kind for parent in before.parents} if before else set()
    return {"config.tasks"} | {f"parent {kind}" for kind in {f"{b.folder}{ROWS}" for b in BENCHMARKS.values()} - kept}


class _Loaded:
    """The model, loaded when first needed: whole, to read held-out responses, and as lm-eval asks it."""

    def __init__(self, name: str, config: EvalConfig) -> None:
        self.name, self.config = name, config

    @cached_property
    def whole(self) -> LanguageModel:
        return load_model(self.name, self.config.dtype)

    @cached_property
    def answering(self) -> Any:
        config = self.config
        if config.engine == "vllm":
            vars(self).pop("whole", None)  # its memory is needed
            from tsdkd.stages.evaluation.answerers_vllm import OnVLLM

            return OnVLLM(self.name, config)
        from tsdkd.stages.evaluation.answerers import OnTransformers

        context = min(config.max_length or self.whole.context, self.whole.context)
        return OnTransformers(self.whole, context, config.batch_size)

    def close(self) -> None:
        if "answering" in vars(self):
            self.answering.close()


def _require_engine(config: EvalConfig) -> None:
    if config.engine == "vllm" and find_spec("vllm") is None:
        raise InputError("vLLM is not installed.", "Run `pip install 'tsdkd[vllm]'`, or use --engine transformers.")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(
            "eval runs in one process.", "Start it without torchrun; for more GPUs, --engine vllm --tensor-parallel N."
        )


def _require_room(benchmarks: list[Benchmark], config: EvalConfig, context: int) -> None:
    for benchmark in benchmarks:
        limit = min(benchmark.max_new_tokens or 0, config.max_new_tokens or context)
        if limit >= context:
            raise InputError(
                f"{benchmark.name} answers with up to {limit:,} tokens; prompt and answer together have {context:,}.",
                "Give a smaller --max-new-tokens, or leave the benchmark out.",
            )


def _uses_chat_template(model: str, config: EvalConfig) -> bool:
    there = load_tokenizer(model).chat_template is not None
    if config.chat_template and not there:
        raise InputError(f"{model} has no chat template.", "Leave out --chat-template.")
    return there if config.chat_template is None else config.chat_template


def _result(benchmark: Benchmark, rows: list[dict[str, Any]]) -> dict[str, Any]:
    def of(key: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["metric"] == key]

    headline = of(benchmark.metric)
    value, stderr = harness.mean(headline)
    return {
        "metric": benchmark.metric,
        "value": value,
        "stderr": stderr,
        "documents": len(headline),
        "others": {key: list(harness.mean(of(key))) for key in benchmark.others},
        "shots": benchmark.shots,
        "truncated": sum(row["truncated"] for row in headline),
        "prompts_cut": sum(row["prompt_cut"] for row in headline),
    }


def _said(benchmark: Benchmark, result: dict[str, Any]) -> str:
    error = "" if result["stderr"] is None else f" ± {100 * result['stderr']:.1f}"
    said = f"{benchmark.name}: {100 * result['value']:.1f}{error} % of {result['documents']:,} documents"
    if result["truncated"]:
        said += f", {result['truncated']:,} answers cut off at their limit"
    if result["prompts_cut"]:
        said += f", {result['prompts_cut']:,} prompts cut on the left to fit the context"
    return said


def _write(writer: Writer, file: str, content: dict[str, Any]) -> None:
    writer.aside(file).write_text(json.dumps(content))
    writer.add_file(file)
