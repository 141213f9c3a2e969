"""eval: any model -> results. Benchmarks through lm-eval, and divergence from the teacher on held-out responses.

Each benchmark has a file of samples and a file with its result; a complete benchmark is skipped.
"""

import json
import time
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from tsdkd.artifacts.hashing import content_digest
from tsdkd.artifacts.json_files import read_json
from tsdkd.artifacts.locks import reading_inputs
from tsdkd.artifacts.manifest import Manifest, Parent, relative_path
from tsdkd.artifacts.reader import Artifact
from tsdkd.artifacts.replacing import unfinished_extension
from tsdkd.artifacts.schemas import schema_of
from tsdkd.artifacts.summaries import MeasuredSummary
from tsdkd.artifacts.writer import Writer
from tsdkd.stages.config.chat import recorded_config
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.data.held_out import HeldOut, measure_held_out, require_hidden_signal
from tsdkd.stages.data.offline import OfflineSource
from tsdkd.stages.data.readable import require_readable
from tsdkd.stages.data.recorded_chat import template_parents
from tsdkd.stages.engines.choice import engine_version
from tsdkd.stages.engines.transformers_engine import sample_responses
from tsdkd.stages.eval import harness
from tsdkd.stages.eval.chat_format import require_trained_format, template_in_words, uses_chat_template
from tsdkd.stages.eval.evaluated_model import EvaluatedModel
from tsdkd.stages.eval.prerequisites import (
    require_end_token,
    require_engine,
    require_prerequisites,
    require_sampling,
    require_space_for_prompts,
)
from tsdkd.stages.eval.previous_results import (
    DATASET_KIND,
    extendable_fields,
    previous_results,
    require_same_settings,
)
from tsdkd.stages.eval.summary import result_line, summarize
from tsdkd.stages.models.attention import require_attention
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.paths import model_directory
from tsdkd.stages.models.record import (
    chat_day,
    library_versions,
    model_record,
    require_same_tokenizer,
)
from tsdkd.stages.models.spec import load_spec
from tsdkd.stages.models.tokenizers import day_arguments, load_tokenizer
from tsdkd.stages.observer import Observer, SilentObserver
from tsdkd.stages.parallel.choice import is_parallel, open_pool
from tsdkd.stages.parallel.pool import Pool
from tsdkd.stages.results.benchmark import Benchmark
from tsdkd.stages.results.benchmarks import choose_benchmarks

HELD_OUT_FILE = "held_out.json"
NOT_IN_CONFIG = {"memory_fraction", "data_parallel", "ray", "seed"}
"""Settings that the manifest does not record, or not in its configuration."""


@reading_inputs()
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
    """Evaluate one model and write results to `output`, whose last component is the model's name in comparisons.

    `data`: a directory of local datasets; `held_out`: a run directory with rollouts and scores. New benchmarks are
    added to existing results, which stay as they are until the new benchmarks are complete.

    Raises InputError before anything is written and before the first response.
    """
    observer = observer or SilentObserver()
    chat = require_measurable(model, output, config, data, held_out, overwrite, allow_code_execution)
    benchmarks = choose_benchmarks(config.tasks)
    source = None if held_out is None else OfflineSource(held_out / "rollouts", held_out / "scores")
    previous = None if overwrite else previous_results(unfinished_extension(output) or output)
    manifest = _manifest(model, output, config, benchmarks, data, source, previous)
    may_differ = extendable_fields(previous)
    day = chat_day(load_tokenizer(model, config.chat), output, manifest, overwrite, may_differ) if chat else None
    manifest = replace(manifest, day=day)
    with (
        Writer.open(output, manifest, overwrite=overwrite, may_differ=may_differ) as writer,
        observer.writing(writer.path),
        ExitStack() as stack,
    ):
        if writer.complete:
            observer.info(f"{output} is complete: nothing to do.")
            return writer.artifact
        incomplete = [benchmark for benchmark in benchmarks if not writer.has(f"{benchmark.file_stem}.json")]
        tasks = {b.name: harness.load_tasks(b, data, config.max_new_tokens, chat) for b in incomplete}
        pool = stack.enter_context(_pool(config, manifest, observer)) if incomplete and is_parallel(config) else None
        make = partial(_make_parallel_model, pool, model, config, chat) if pool else None
        evaluated = stack.enter_context(closing(EvaluatedModel(model, config, chat, observer, make)))
        if source is not None and not writer.has(HELD_OUT_FILE):
            _write_json(writer, HELD_OUT_FILE, _measure_held_out(evaluated.language_model, source, config, observer))
        if incomplete:
            require_space_for_prompts(incomplete, config, evaluated.lm_eval_model.max_length)
            template = template_in_words(model, config.chat) if chat else "no chat template"
            observer.info(f"{output.name}: {model} is prompted with {template}.")
            evaluated.lm_eval_model.chat_template_args |= day_arguments(day)
        for benchmark in incomplete:
            _add_benchmark(writer, evaluated.lm_eval_model, benchmark, tasks[benchmark.name], config, chat, observer)
        files = {b.name: f"{b.file_stem}.json" for b in choose_benchmarks(manifest.config["tasks"])}
        files |= {"held_out": HELD_OUT_FILE} if source is not None else {}
        summary = {name: read_json(writer.path / file, MeasuredSummary) for name, file in files.items()}
        return writer.finish(summary, observer.info)


def _make_parallel_model(pool: Pool, model: str, config: EvalConfig, chat: bool) -> Any:
    from tsdkd.stages.eval.lm_eval_parallel import ParallelModel

    return ParallelModel(pool, model, config, chat)


def _pool(config: EvalConfig, manifest: Manifest, observer: Observer) -> AbstractContextManager[Pool]:
    return open_pool(config, config.tensor_parallel if config.engine == "vllm" else 1, manifest.models, observer)


def require_measurable(
    model: str,
    output: Path,
    config: EvalConfig,
    data: Path | None,
    held_out: Path | None,
    overwrite: bool,
    allow_code_execution: bool,
) -> bool:
    """Raises InputError for inputs that fail without hashing or loading a model; arguments as for `evaluate`.

    Returns whether the model is prompted with its chat template.
    """
    benchmarks = choose_benchmarks(config.tasks)
    require_engine(config, held_out)
    require_sampling(config, benchmarks)
    model_directory(model)
    require_attention(config.attention, [model])
    require_prerequisites(benchmarks, data, allow_code_execution)
    chat = uses_chat_template(model, config, benchmarks)
    require_end_token(load_spec(model), benchmarks)
    require_trained_format(model, output, config)
    if previous := None if overwrite else previous_results(unfinished_extension(output) or output):
        require_same_settings(output, previous, config)
    return chat


def _add_benchmark(
    writer: Writer,
    lm_eval_model: Any,
    benchmark: Benchmark,
    tasks: harness.Tasks,
    config: EvalConfig,
    chat: bool,
    observer: Observer,
) -> None:
    """Run a benchmark and write its samples and its result."""
    model, started = writer.output.name, time.monotonic()
    sampling = benchmark.choose_sampling(config)
    try:
        rows = harness.run_benchmark(
            lm_eval_model, model, benchmark, tasks, config.limit, chat, observer, sampling, config.seed
        )
    except KeyboardInterrupt:
        observer.info(f"{model}: the next run starts {benchmark.name} again and skips complete benchmarks.")
        raise
    limit = benchmark.response_limit(config.max_new_tokens)
    result = summarize(benchmark, rows, sampling) | {"chat_template": chat}
    result |= {"max_new_tokens": limit} if limit else {}
    writer.write_table(f"{benchmark.file_stem}.parquet", pa.Table.from_pylist(rows, schema_of("results", ["sample"])))
    _write_json(writer, f"{benchmark.file_stem}.json", result)
    observer.info(f"{model}: {result_line(benchmark, result)}, {time.monotonic() - started:,.0f} s")


def _manifest(
    model: str,
    output: Path,
    config: EvalConfig,
    benchmarks: list[Benchmark],
    data: Path | None,
    source: OfflineSource | None,
    previous: Manifest | None,
) -> Manifest:
    """`source`: held-out rollouts with scores; `previous`: existing results, whose benchmarks stay."""
    record = model_record("evaluated", model, chat=config.chat)
    datasets = dict.fromkeys(path for benchmark in benchmarks if (path := benchmark.local_dataset(data)))
    parents = [
        Parent(f"{path.name}{DATASET_KIND}", content_digest(path), relative_path(path, output)) for path in datasets
    ]
    parents += template_parents(config.chat, output)
    tasks = {benchmark.name for benchmark in benchmarks}
    if previous:
        kinds = {parent.kind for parent in parents}
        parents += [p for p in previous.parents if p.kind.endswith(DATASET_KIND) and p.kind not in kinds]
        tasks |= set(previous.config["tasks"])
    settings = {name: value for name, value in recorded_config(config).items() if name not in NOT_IN_CONFIG}
    if source is not None:
        require_hidden_signal(source)
        for teacher in source.teachers:
            require_same_tokenizer(record, teacher)
        spec = load_spec(model)
        require_readable(source.rollouts, [spec])
        source.shared_vocab(spec)
        parents += [source.scores.as_parent_of(output)]
    return Manifest(
        kind="results",
        config=settings | {"tasks": [benchmark.name for benchmark in choose_benchmarks(tasks)]},
        seed=config.seed,
        parents=tuple(parents),
        models=(record,),
        engine=f"lm-eval on {config.engine}",
        libraries=library_versions() | harness.evaluation_versions() | engine_version(config.engine),
    )


def _measure_held_out(
    language_model: LanguageModel, source: OfflineSource, config: EvalConfig, observer: Observer
) -> dict[str, Any]:
    """Divergence from the teacher on held-out responses, with one greedy response."""
    if source.decoder.vocab is not None:
        language_model = replace(language_model, shared_vocab=source.decoder.vocab)
    with observer.progress("held-out responses read", len(source), "responses") as advance:
        measures = measure_held_out(
            language_model,
            language_model.head,
            HeldOut(source, range(len(source))),
            (config.batch_size or 16) * 512,
            advance,
        )
    return measures | greedy_response(language_model, source)


def greedy_response(language_model: LanguageModel, source: OfflineSource, max_new_tokens: int = 40) -> dict[str, str]:
    """The first held-out prompt and the model's greedy response."""
    prompt = source.rollouts.table(["messages"])["messages"][0].as_py()[-1]["content"]
    (ids,) = sample_responses(language_model, [source.prompt_ids(0)], max_new_tokens, temperature=0)
    return {"prompt": prompt, "response": language_model.tokenizer.decode(ids, skip_special_tokens=True)}


def _write_json(writer: Writer, file: str, content: dict[str, Any]) -> None:
    writer.temporary_path(file).write_text(json.dumps(content))
    writer.add_file(file)
