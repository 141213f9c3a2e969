"""lm-eval, seen from here: tasks are loaded, a model answers, and out come rows and means. Nothing else calls it."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import sqrt
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from tsdkd.artifacts.hashing import content_digest
from tsdkd.errors import InputError, TsdkdError
from tsdkd.stages.eval import sandbox
from tsdkd.stages.observer import Observer
from tsdkd.stages.results.benchmarks import BENCHMARKS, Benchmark

SHOTS_SEED = 1234
"""lm-eval's own, for shots that are drawn."""
Tasks = dict[str, Any]
"""lm-eval's tasks by name."""


def require_prerequisites(benchmarks: list[Benchmark], data: Path | None, allow_code: bool) -> None:
    """Raise InputError that names all of what a run needs and lacks; lm-eval would find out after all was answered."""
    lacking = [error for benchmark in benchmarks for error in _lacking(benchmark, data, allow_code)]
    if lacking:
        raise InputError(*(" ".join(said) for said in zip(*((e.cause, e.remedy) for e in lacking), strict=True)))


def _lacking(benchmark: Benchmark, data: Path | None, allow_code: bool) -> Iterator[InputError]:
    rows = benchmark.rows(data)
    checks: list[Callable[[], None]] = []
    if rows:
        checks.append(partial(_require_rows, benchmark.name, rows))
    if benchmark.runs_code:
        checks.append(partial(_require_code, benchmark.name, allow_code))
    if benchmark.base == "ifeval":
        checks.append(partial(_require_sentences, benchmark.name))
    for check in checks:
        try:
            check()
        except InputError as error:
            yield error


def _require_rows(name: str, rows: Path) -> None:
    if not rows.is_dir():
        raise InputError(
            f"{name} needs {rows}.", "Put a copy of the dataset's repository there, or leave out --data to use the hub."
        )


def _require_code(name: str, allowed: bool) -> None:
    if not allowed:
        raise InputError(
            f"{name} runs programs that the model wrote.",
            "Give --allow-code-execution (they run confined; see docs/evaluation.md), or leave it out of --tasks.",
        )
    reason = sandbox.why_unavailable()
    if reason:
        raise InputError(
            f"{name} runs programs that the model wrote, and here they cannot be confined ({reason}).",
            "Run on Linux with libseccomp, or leave it out of --tasks.",
        )


def _require_sentences(name: str) -> None:
    """lm-eval would download this at import, and without a network fail once everything is answered."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        raise InputError(
            f"{name} splits sentences with nltk's punkt_tab, which is not installed.",
            "Run `python -m nltk.downloader punkt_tab`, or copy it to $NLTK_DATA/tokenizers/punkt_tab.",
        ) from None


def load_tasks(benchmark: Benchmark, data: Path | None, most_new_tokens: int | None) -> Tasks:
    """lm-eval's tasks with their rows read. Raises InputError when they cannot be had."""
    import datasets
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    rows = benchmark.rows(data)
    # By itself the library would know a folder by its name, and take rows it once read from another one.
    cache = Path(datasets.config.HF_DATASETS_CACHE) / f"tsdkd-{content_digest(rows)[:16]}" if rows else None
    overlays = benchmark.overlays(rows, cache)
    with TemporaryDirectory() as directory:
        for name, content in overlays.items():
            (Path(directory) / f"{name}.yaml").write_text(content)
        manager = TaskManager(include_path=directory, include_defaults=False)
        try:
            tasks: Tasks = manager.load(sorted(overlays))["tasks"]
        except Exception as error:  # the hub, the builder, a missing column: each raises its own
            raise InputError(
                f"{benchmark.name} cannot be loaded from {rows or 'the hub'} "
                f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]}).",
                f"Needed: split {benchmark.split}{_variants(benchmark)}. Without a network, name copies with --data.",
            ) from None
    for task in tasks.values():
        task.set_fewshot_seed(SHOTS_SEED)
        if benchmark.max_new_tokens:
            limit = min(benchmark.max_new_tokens, most_new_tokens or benchmark.max_new_tokens)
            task.set_config("generation_kwargs", {"max_gen_toks": limit}, update=True)
    if benchmark.base == "ifeval":
        import langdetect

        langdetect.DetectorFactory.seed = 0
    return tasks


def _variants(benchmark: Benchmark) -> str:
    names = [
        name for name, other in BENCHMARKS.items() if other.base == benchmark.base and other.split != benchmark.split
    ]
    return f" (or choose {', '.join(names)})" if names else ""


def run_benchmark(
    model: Any, name: str, benchmark: Benchmark, tasks: Tasks, limit: int | None, chat: bool, observer: Observer
) -> list[dict[str, Any]]:
    """A row for each document and metric. `name`: the model's; `limit`: documents, spread over the tasks."""
    chosen = None if limit is None else spread_limit({name: len(task.eval_docs) for name, task in tasks.items()}, limit)
    model.notes.cut_answers.clear()
    model.notes.cut_prompts.clear()
    with _quiet(f"{name}: {benchmark.name} answered", observer, model.notes):
        from lm_eval.evaluator import evaluate

        results = evaluate(
            lm=model,
            task_dict={"tasks": tasks if chosen is None else {name: tasks[name] for name in chosen}, "groups": {}},
            samples=chosen,
            apply_chat_template=chat,
            fewshot_as_multiturn=True,
            bootstrap_iters=0,
            confirm_run_unsafe_code=True,  # `require` has asked
        )
    if results is None:
        raise TsdkdError(f"lm-eval gave no results for {benchmark.name}.", "Run eval in a single process.")
    return [
        _row(benchmark, name, key, sample, model.notes)
        for name, samples in sorted(results["samples"].items())
        for key in (benchmark.metric, *benchmark.others)
        for sample in sorted(samples, key=lambda sample: sample["doc_id"])
        if sample["filter"] == key.partition(",")[2]
    ]


def spread_limit(sizes: dict[str, int], limit: int) -> dict[str, list[int]]:
    """The first documents of each task, `limit` in all, as even as sizes allow; tasks without any are left out."""
    chosen, left = {}, limit
    for place, name in enumerate(sorted(sizes, key=lambda name: (sizes[name], name))):
        share = min(sizes[name], left // (len(sizes) - place))
        left -= share
        if share:
            chosen[name] = list(range(share))
    return chosen


def weighted_mean(rows: list[dict[str, Any]]) -> tuple[float, float | None]:
    """The weighted mean of the rows' scores, and its standard error: documents are drawn, not what is in them."""
    weights = [row["weight"] for row in rows]
    value = sum(row["score"] * row["weight"] for row in rows) / sum(weights)
    if len(rows) < 2:
        return value, None
    squares = sum((weight * (row["score"] - value)) ** 2 for row, weight in zip(rows, weights, strict=True))
    return value, sqrt(squares * len(rows) / (len(rows) - 1)) / sum(weights)


def _row(benchmark: Benchmark, task: str, key: str, sample: dict[str, Any], notes: Any) -> dict[str, Any]:
    prompt = str(sample["arguments"][0][0])
    verdict = sample[key.partition(",")[0]]
    parts = [float(part) for part in verdict] if isinstance(verdict, list) else [float(verdict)]
    answer, extracted, target = _said(sample) if benchmark.max_new_tokens else _preferred(sample, "norm" in key)
    return {
        "task": benchmark.name,
        "subtask": task,
        "document": sample["doc_id"],
        "hash": sample["doc_hash"],
        "metric": key,
        "prompt": prompt,
        "answer": answer,
        "extracted": extracted,
        "target": target,
        "score": sum(parts) / len(parts),
        "weight": float(len(parts)),
        "truncated": prompt in notes.cut_answers,
        "prompt_cut": prompt in notes.cut_prompts,
    }


def _said(sample: dict[str, Any]) -> tuple[str, str, str]:
    return str(sample["resps"][0][0]), str(sample["filtered_resps"][0]), str(sample["target"])


def _preferred(sample: dict[str, Any], by_length: bool) -> tuple[str, str, str]:
    """Of a multiple choice: every choice with its log-likelihood, the one preferred, and the right one."""
    choices = [continuation.strip() for _, continuation in sample["arguments"]]
    likelihoods = [float(response[0][0]) for response in sample["resps"]]
    ranks = [value / len(choice) if by_length else value for value, choice in zip(likelihoods, choices, strict=True)]
    target = sample["target"]
    listed = "\n".join(f"{value:.3f} {choice}" for value, choice in zip(likelihoods, choices, strict=True))
    return listed, choices[ranks.index(max(ranks))], choices[target] if isinstance(target, int) else str(target)


@contextmanager
def _quiet(what: str, observer: Observer, notes: Any) -> Iterator[None]:
    """lm-eval with its progress shown by the observer, and nothing else on the screen."""
    import lm_eval.api.model
    import lm_eval.api.task

    backends = [sys.modules.get(f"lm_eval.models.{name}") for name in ("huggingface", "vllm_causallms")]
    with ExitStack() as patches, ExitStack() as bars:

        class Bar:
            def __init__(self, *_: Any, total: int = 0, **__: Any) -> None:
                notes.measures = observer.metrics
                notes.advance = bars.enter_context(observer.progress(what, total, "requests"))

            def update(self, count: int) -> None:
                if not notes.tells:
                    notes.advance(count)

            def close(self) -> None:
                bars.close()

        for module in filter(None, backends):
            patches.enter_context(patch.object(module, "tqdm", Bar))
        for module in (lm_eval.api.task, lm_eval.api.model):
            patches.enter_context(patch.object(module, "tqdm", _silent_bar))
        yield


def _silent_bar(rows: Any, **_: Any) -> Any:
    return rows
