"""The only module that runs lm-eval: loads tasks, and returns a row per document, metric and sample."""

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import distributions, version
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tsdkd.artifacts.hashing import content_digest
from tsdkd.errors import InputError, TsdkdError, first_line
from tsdkd.stages.eval.lm_eval_tasks import task_overlays
from tsdkd.stages.eval.prerequisites import gated_remedy
from tsdkd.stages.eval.sandbox.verdict import hides_files
from tsdkd.stages.eval.scorers import ProgramScore
from tsdkd.stages.models.attributes import replaced_attribute
from tsdkd.stages.observer import Observer
from tsdkd.stages.results.benchmark import GREEDY, Benchmark, Sampling
from tsdkd.stages.results.benchmarks import BENCHMARKS

SHOTS_SEED = 1234
"""lm-eval's default seed for shots that are sampled."""
Tasks = dict[str, Any]
"""lm-eval's tasks by name."""
LIBRARIES = ("lm_eval", "datasets", "math-verify", "langdetect", "nltk")
"""Libraries that decide prompts and scores."""


def evaluation_versions() -> dict[str, str]:
    """Versions of those of `LIBRARIES` that are installed."""
    return {name: version(name) for name in LIBRARIES if any(distributions(name=name))}


def load_tasks(benchmark: Benchmark, data: Path | None, max_new_tokens: int | None, chat: bool = False) -> Tasks:
    """lm-eval's tasks of a benchmark with their documents.

    `data`: the directory of local datasets, or None for the hub; `max_new_tokens`: replaces the benchmark's limit;
    `chat`: prompts use the chat template, which decides the stop strings.

    Raises InputError when a dataset cannot be loaded.
    """
    import datasets
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    dataset = benchmark.local_dataset(data)
    # The library caches a directory by its name: a cache by content keeps directories of one name apart.
    cache = Path(datasets.config.HF_DATASETS_CACHE) / f"tsdkd-{content_digest(dataset)[:16]}" if dataset else None
    overlays = task_overlays(benchmark, dataset, cache)
    with TemporaryDirectory() as directory:
        for name, content in overlays.items():
            (Path(directory) / f"{name}.yaml").write_text(content)
        manager = TaskManager(include_path=directory, include_defaults=False)
        try:
            tasks: Tasks = manager.load(sorted(overlays))["tasks"]
        except Exception as error:  # the hub, the builder and a missing column raise different types
            raise InputError(
                f"{benchmark.name} cannot be loaded from {dataset or 'the hub'} "
                f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]}).",
                gated_remedy(benchmark)
                if benchmark.gated and dataset is None
                else f"It needs the split {benchmark.split}{_name_variants(benchmark)}, with the columns of the hub's "
                "dataset. Without a network, name local copies with --data.",
            ) from None
    for task in tasks.values():
        task.set_fewshot_seed(SHOTS_SEED)
        if limit := benchmark.response_limit(max_new_tokens):
            stops = {"until": list(benchmark.chat_stops)} if chat else {}
            task.set_config("generation_kwargs", {"max_gen_toks": limit} | stops, update=True)
    if benchmark.base == "ifeval":
        import langdetect

        langdetect.DetectorFactory.seed = 0
    return tasks


def _name_variants(benchmark: Benchmark) -> str:
    """The variants of the benchmark that use another split."""
    names = [
        name for name, other in BENCHMARKS.items() if other.base == benchmark.base and other.split != benchmark.split
    ]
    return f" (or choose {', '.join(names)})" if names else ""


def run_benchmark(
    model: Any,
    name: str,
    benchmark: Benchmark,
    tasks: Tasks,
    limit: int | None,
    chat: bool,
    observer: Observer,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Evaluate a model and return a row per document, metric and sample, as in the schema of results.

    `model`: one of lm-eval's, with `ResponseTracking`; `name`: the name to show; `limit`: documents of all tasks
    together; `chat`: apply the chat template; `seed`: that of the samples.
    """
    chosen = None if limit is None else spread_limit({name: len(task.eval_docs) for name, task in tasks.items()}, limit)
    tasks = tasks if chosen is None else {name: tasks[name] for name in chosen}
    model.start_benchmark(sampling, seed, benchmark.whole_prompts)
    if benchmark.runs_code and not hides_files():
        observer.warning(f"{name}: this kernel has no Landlock, so programs can read files, tests included.")
    with _progress_shown(f"{name}: {benchmark.name}", observer, model.request_progress):
        samples = [_score_sample(model, benchmark, tasks, chosen, chat) for _ in range(sampling.samples)]
    return [
        _result_row(benchmark, task, metric, number, document, model.response_log)
        for task in sorted(tasks)
        for metric in (benchmark.metric, *benchmark.other_metrics)
        for documents in zip(*(_scored_by(metric, sample[task]) for sample in samples), strict=True)
        for number, document in enumerate(documents)
    ]


def _score_sample(
    model: Any, benchmark: Benchmark, tasks: Tasks, chosen: dict[str, list[int]] | None, chat: bool
) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's documents with their scores, by task. The first call samples the responses of all later calls too.

    lm-eval's own repeats would score the first sample only.
    """
    from lm_eval.evaluator import evaluate

    for task in tasks.values():
        task.set_fewshot_seed(SHOTS_SEED)  # every sample has the same shots
    try:
        results = evaluate(
            lm=model,
            task_dict={"tasks": tasks, "groups": {}},
            samples=chosen,
            apply_chat_template=chat,
            fewshot_as_multiturn=True,
            bootstrap_iters=0,
            confirm_run_unsafe_code=True,  # `require_prerequisites` requires --allow-code-execution
        )
    except AssertionError as error:  # lm-eval's, for a choice that is longer than the context
        raise TsdkdError(
            f"lm-eval cannot run {benchmark.name} in a context of {model.max_length} tokens ({first_line(error)}).",
            "Give a larger --max-length, or leave the benchmark out.",
        ) from None
    if results is None:
        raise TsdkdError(f"lm-eval returned no results for {benchmark.name}.", "Run eval in a single process.")
    return dict(results["samples"])


def _scored_by(metric: str, documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The documents with the filter of a metric, in their order."""
    filter_ = metric.partition(",")[2]
    return sorted((d for d in documents if d["filter"] == filter_), key=lambda document: document["doc_id"])


def spread_limit(sizes: dict[str, int], limit: int) -> dict[str, list[int]]:
    """Numbers of the first documents of each task, `limit` in total, as evenly as the tasks' sizes allow.

    Tasks without documents are omitted.
    """
    chosen, left = {}, limit
    for i, name in enumerate(sorted(sizes, key=lambda name: (sizes[name], name))):
        count = min(sizes[name], left // (len(sizes) - i))
        left -= count
        if count:
            chosen[name] = list(range(count))
    return chosen


def weighted_mean(rows: list[dict[str, Any]]) -> tuple[float, float | None]:
    """The weighted mean of the scores, and the standard error of a ratio estimator over documents.

    The error is None for a single row.
    """
    weights = [row["weight"] for row in rows]
    value = sum(row["score"] * row["weight"] for row in rows) / sum(weights)
    if len(rows) < 2:
        return value, None
    squares = sum((weight * (row["score"] - value)) ** 2 for row, weight in zip(rows, weights, strict=True))
    return value, sqrt(squares * len(rows) / (len(rows) - 1)) / sum(weights)


def _result_row(
    benchmark: Benchmark, task: str, metric: str, number: int, document: dict[str, Any], log: Any
) -> dict[str, Any]:
    """A row of the results' schema, the stop string that ended the response, and the verdict on its program.

    `number`: that of the sample.
    """
    prompt = str(document["arguments"][0][0])
    value = document[metric.partition(",")[0]]
    response = document["resps"][0][0] if benchmark.max_new_tokens else None
    parts = [float(part) for part in value] if isinstance(value, list) else [float(value)]
    by_length = "norm" in metric
    texts = _choice_texts(document, by_length) if response is None else _generation_texts(document)
    return {
        "task": benchmark.name,
        "subtask": task,
        "document": document["doc_id"],
        "document_hash": document["doc_hash"],
        "sample": number,
        "metric": metric,
        "prompt": prompt,
        **texts,
        "score": sum(parts) / len(parts),
        "weight": float(len(parts)),
        "truncated": response is not None and response.truncated,
        "prompt_truncated": prompt in log.truncated_prompts,
        "stop": None if response is None else response.stop,
        "verdict": value.verdict if isinstance(value, ProgramScore) else None,
    }


def _generation_texts(document: dict[str, Any]) -> dict[str, str]:
    return {
        "response": document["resps"][0][0].text,
        "extracted": str(document["filtered_resps"][0]),
        "target": str(document["target"]),
    }


def _choice_texts(document: dict[str, Any], by_length: bool) -> dict[str, str]:
    """Of a multiple choice: all choices with their log-likelihoods, the likeliest choice, and the right choice."""
    choices = [continuation.strip() for _, continuation in document["arguments"]]
    likelihoods = [float(response[0][0]) for response in document["resps"]]
    values = [value / len(choice) if by_length else value for value, choice in zip(likelihoods, choices, strict=True)]
    target = document["target"]
    return {
        "response": "\n".join(f"{value:.3f} {choice}" for value, choice in zip(likelihoods, choices, strict=True)),
        "extracted": choices[values.index(max(values))],
        "target": choices[target] if isinstance(target, int) else str(target),
    }


def lm_eval_backends() -> list[Any]:
    """The modules of lm-eval's model classes that are imported."""
    names = (f"lm_eval.models.{name}" for name in ("huggingface", "vllm_causallms"))
    return [sys.modules[name] for name in names if name in sys.modules]


@contextmanager
def _progress_shown(title: str, observer: Observer, progress: Any) -> Iterator[None]:
    """Replaces lm-eval's progress bars by the observer's. `progress`: the model's `RequestProgress`."""
    import lm_eval.api.model
    import lm_eval.api.task

    with ExitStack() as replacements, ExitStack() as bars:

        class Bar:
            def __init__(self, *_: Any, total: int = 0, **__: Any) -> None:
                progress.show_metrics = observer.metrics
                progress.advance = bars.enter_context(observer.progress(title, total, "requests"))

            def update(self, count: int) -> None:
                if not progress.counted_by_engine:
                    progress.advance(count)

            def close(self) -> None:
                bars.close()

        progress.open_bar = lambda total: Bar(total=total)
        for module in lm_eval_backends():
            replacements.enter_context(replaced_attribute(module, "tqdm", Bar))
        for module in (lm_eval.api.task, lm_eval.api.model):
            replacements.enter_context(replaced_attribute(module, "tqdm", _without_bar))
        yield


def _without_bar(rows: Any, **_: Any) -> Any:
    return rows
