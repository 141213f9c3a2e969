"""eval: any model -> results. Benchmarks through lm-eval, and closeness to the teacher on held-out responses.

Every benchmark becomes one part with its samples; a finished one is not run again.
"""

import json
import time
from contextlib import closing
from dataclasses import asdict, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa

from tsdkd.artifacts.hashing import content_digest
from tsdkd.artifacts.manifest import MANIFEST_FILE, Manifest, Parent, load_manifest, relative_path
from tsdkd.artifacts.reader import Artifact
from tsdkd.artifacts.schemas import SCHEMAS
from tsdkd.artifacts.writer import Writer
from tsdkd.errors import InputError
from tsdkd.ranks import world_size
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.data.held_out import HeldOut, measure_held_out, require_hidden_signal
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.engines.transformers_engine import sample_responses
from tsdkd.stages.eval import harness
from tsdkd.stages.models.load import LanguageModel, load_model
from tsdkd.stages.models.record import library_versions, model_record, require_same_tokenizer
from tsdkd.stages.models.tokenizers import load_tokenizer
from tsdkd.stages.observer import Observer, SilentObserver
from tsdkd.stages.results.benchmarks import BENCHMARKS, Benchmark, choose_benchmarks

HELD_OUT_FILE = "held_out.json"
ROWS = " rows"
"""Ends the kind of parents that are copies of benchmarks."""


def evaluate(
    model: str,
    output: Path,
    config: EvalConfig,
    data: Path | None = None,
    held_out: Path | None = None,
    observer: Observer | None = None,
    overwrite: bool = False,
    allow_code_execution: bool = False,
) -> Artifact:
    """Measure one model. `data`: local benchmark folders; `held_out`: a run directory with rollouts and scores.

    Benchmarks are added to results that are there. The results' last folder is what the model is called.

    Raises InputError before anything is written and before the first answer.
    """
    observer = observer or SilentObserver()
    benchmarks = choose_benchmarks(config.tasks)
    _require_engine(config)
    harness.require_prerequisites(benchmarks, data, allow_code_execution)
    chat = _uses_chat_template(model, config)
    samples = None if held_out is None else OfflineSource(held_out / "rollouts", held_out / "scores")
    before = None if overwrite else _finished(output)
    manifest = _manifest(model, output, config, benchmarks, data, samples, before)
    with (
        Writer.open(output, manifest, overwrite=overwrite, grows=_grows(before)) as writer,
        observer.writing(output),
        closing(_Loaded(model, config)) as loaded,
    ):
        if writer.complete:
            observer.info(f"{output} is complete: nothing to do.")
            return writer.artifact
        left = [benchmark for benchmark in benchmarks if not writer.has(f"{benchmark.key}.json")]
        tasks = {one.name: harness.load_tasks(one, data, config.max_new_tokens) for one in left}
        if samples is not None and not writer.has(HELD_OUT_FILE):
            with observer.progress("held-out responses read", len(samples), "responses") as advance:
                closeness = measure_held_out(
                    loaded.whole,
                    loaded.whole.head,
                    HeldOut(samples, range(len(samples))),
                    (config.batch_size or 16) * 512,
                    advance,
                )
            _write(writer, HELD_OUT_FILE, closeness | greedy_response(loaded.whole, samples))
        if left:
            _require_room(left, config, loaded.answering.max_length)
            how = "through its chat template" if chat else "without a chat template"
            observer.info(f"{output.name} is {model}, asked {how}.")
        for benchmark in left:
            started = time.monotonic()
            asked = output.name, benchmark, tasks[benchmark.name], config.limit, chat
            try:
                rows = harness.run_benchmark(loaded.answering, *asked, observer)
            except KeyboardInterrupt:
                observer.info(f"{output.name}: {benchmark.name} will begin again; what was finished before it is kept.")
                raise
            result = _result(benchmark, rows) | {"chat_template": chat}
            writer.write_table(f"{benchmark.key}.parquet", pa.Table.from_pylist(rows, SCHEMAS["results"]))
            _write(writer, f"{benchmark.key}.json", result)
            observer.info(f"{output.name}: {_said(benchmark, result)}, {time.monotonic() - started:,.0f} s")
        files = {benchmark.name: f"{benchmark.key}.json" for benchmark in choose_benchmarks(manifest.config["tasks"])}
        files |= {"held_out": HELD_OUT_FILE} if samples is not None else {}
        return writer.finish({name: json.loads((output / file).read_text()) for name, file in files.items()})


def _manifest(
    model: str,
    output: Path,
    config: EvalConfig,
    benchmarks: list[Benchmark],
    data: Path | None,
    samples: OfflineSource | None,
    before: Manifest | None,
) -> Manifest:
    """`before`: results that are there, whose benchmarks stay."""
    record = model_record("evaluated", model)
    copies = dict.fromkeys(copy for benchmark in benchmarks if (copy := benchmark.rows(data)))
    parents = [Parent(f"{copy.name}{ROWS}", content_digest(copy), relative_path(copy, output)) for copy in copies]
    tasks = {benchmark.name for benchmark in benchmarks}
    if before:
        known = {parent.kind for parent in parents}
        parents += [parent for parent in before.parents if parent.kind.endswith(ROWS) and parent.kind not in known]
        tasks |= set(before.config["tasks"])
    settings = {name: value for name, value in asdict(config).items() if name != "memory_fraction"}
    if samples is not None:
        require_hidden_signal(samples)
        require_same_tokenizer(record, samples.scores.manifest.model("teacher"))
        parents += [samples.scores.as_parent_of(output)]
    return Manifest(
        kind="results",
        config=settings | {"tasks": [benchmark.name for benchmark in choose_benchmarks(tasks)]},
        seed=0,
        parents=tuple(parents),
        models=(record,),
        engine=f"lm-eval 0.4.13 on {config.engine}",
        libraries=library_versions(),
    )


def _finished(output: Path) -> Manifest | None:
    """The results that are there, with the benchmarks that were finished."""
    if not (output / MANIFEST_FILE).is_file():
        return None
    found = load_manifest(output)
    if found.kind != "results":
        return None
    files = {part.file for part in found.parts}
    tasks = [one.name for one in choose_benchmarks(found.config["tasks"]) if f"{one.key}.json" in files]
    kept = {f"{rows.name}{ROWS}" for one in choose_benchmarks(tasks) if (rows := one.rows(Path()))}
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
            from tsdkd.stages.eval.lm_eval_vllm import VllmModel

            return VllmModel(self.name, config)
        from tsdkd.stages.eval.lm_eval_transformers import TransformersModel

        context = min(config.max_length or self.whole.context, self.whole.context)
        return TransformersModel(self.whole, context, config.batch_size)

    def close(self) -> None:
        if "answering" in vars(self):
            self.answering.close()


def _require_engine(config: EvalConfig) -> None:
    if config.engine == "vllm" and find_spec("vllm") is None:
        raise InputError("vLLM is not installed.", "Run `pip install 'tsdkd[vllm]'`, or use --engine transformers.")
    if world_size() > 1:
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
    value, stderr = harness.weighted_mean(headline)
    return {
        "metric": benchmark.metric,
        "value": value,
        "stderr": stderr,
        "documents": len(headline),
        "others": {key: list(harness.weighted_mean(of(key))) for key in benchmark.others},
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


def greedy_response(language_model: LanguageModel, samples: OfflineSource, max_new_tokens: int = 40) -> dict[str, str]:
    """The first held-out prompt and the model's greedy answer to it."""
    prompt = samples.rollouts.table()["messages"][0].as_py()[-1]["content"]
    (ids,) = sample_responses(language_model, [samples.prompt_ids(0)], max_new_tokens, temperature=0)
    return {"prompt": prompt, "answer": language_model.tokenizer.decode(ids, skip_special_tokens=True)}
