"""The summary of a benchmark's rows: means, standard errors and counts."""

from collections import Counter
from dataclasses import asdict
from math import comb
from typing import Any

from tsdkd.stages.eval.harness import weighted_mean
from tsdkd.stages.results.benchmark import GREEDY, Benchmark, Sampling


def summarize(benchmark: Benchmark, rows: list[dict[str, Any]], sampling: Sampling = GREEDY) -> dict[str, Any]:
    """Means, standard errors and counts of a benchmark, as the results' summary keeps them.

    Means are over documents, each with the mean of its samples; errors treat documents as drawn, as in Miller (2024),
    "Adding Error Bars to Evals". Counts are over responses.
    """
    by_metric: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_metric.setdefault(row["metric"], []).append(row)
    headline = by_metric[benchmark.metric]
    value, stderr = weighted_mean(average_samples(headline))
    verdicts = [row["verdict"] for row in headline if row["verdict"]]
    programs = {
        "sandbox_limits": dict(sorted(Counter(verdict.limit for verdict in verdicts if verdict.limit).items())),
        "judged_by_objects": sum(verdict.judged_by_objects for verdict in verdicts),
    }
    return {
        "metric": benchmark.metric,
        "value": value,
        "stderr": stderr,
        "documents": len(headline) // sampling.samples,
        "other_metrics": {
            metric: list(weighted_mean(average_samples(by_metric[metric]))) for metric in benchmark.other_metrics
        },
        "shots": benchmark.shots,
        "truncated": sum(row["truncated"] for row in headline),
        "prompts_truncated": sum(row["prompt_truncated"] for row in headline),
        "stopped_by": dict(sorted(Counter(row["stop"] for row in headline if row["stop"]).items())),
        **(programs if verdicts else {}),
        **(asdict(sampling) if benchmark.max_new_tokens else {}),
        **({"pass_at": pass_at(headline)} if sampling.samples > 1 else {}),
    }


def average_samples(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per document of a metric, with the mean score of its samples."""
    return [
        {"score": sum(row["score"] for row in samples) / len(samples), "weight": samples[0]["weight"]}
        for samples in _by_document(rows)
    ]


def pass_at(rows: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """pass@k with its standard error over documents, for k = 2, 4, 8, ... and the number of samples.

    The unbiased estimator of Chen et al. (2021): 1 - C(n - c, k) / C(n, k) for c right responses of n. Empty for
    scores between 0 and 1.
    """
    documents = [[row["score"] for row in samples] for samples in _by_document(rows)]
    if not {score for scores in documents for score in scores} <= {0.0, 1.0}:
        return {}
    n = len(documents[0])
    ks = [*(2**i for i in range(1, n.bit_length()) if 2**i < n), n]
    return {str(k): list(weighted_mean([_pass_at(k, scores) for scores in documents])) for k in ks}


def _pass_at(k: int, scores: list[float]) -> dict[str, Any]:
    """A document's probability that one of k responses is right."""
    n, right = len(scores), int(sum(scores))
    return {"score": 1 - comb(n - right, k) / comb(n, k), "weight": 1.0}


def _by_document(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of each document."""
    documents: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        documents.setdefault((row["subtask"], row["document"]), []).append(row)
    return list(documents.values())


def result_line(benchmark: Benchmark, result: dict[str, Any]) -> str:
    """A benchmark's result in words, with the responses that their limit or a stop string ended."""
    error = "" if result["stderr"] is None else f" ± {100 * result['stderr']:.1f}"
    line = f"{benchmark.name}: {100 * result['value']:.1f}{error} % of {result['documents']:,} documents"
    if result.get("samples", 1) > 1:
        line += f" (avg@{result['samples']})"
    for k, (value, _) in list(result.get("pass_at", {}).items())[-1:]:
        line += f", pass@{k} {100 * value:.1f} %"
    if result["truncated"]:
        line += f", {result['truncated']:,} responses truncated at their limit"
    if result["prompts_truncated"]:
        line += f", {result['prompts_truncated']:,} prompts truncated on the left to fit the context"
    if result["stopped_by"]:
        stops = ", ".join(f"{stop!r} {count:,}" for stop, count in result["stopped_by"].items())
        line += f", responses ended by a stop string: {stops}"
    if result.get("sandbox_limits"):
        limits = ", ".join(f"{limit} {count:,}" for limit, count in result["sandbox_limits"].items())
        line += f", programs that failed at a limit of the sandbox: {limits}"
    if result.get("judged_by_objects"):
        line += f", programs judged by objects: {result['judged_by_objects']:,}"
    return line
