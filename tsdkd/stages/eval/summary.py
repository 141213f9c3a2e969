"""The summary of a benchmark's rows: means, standard errors and counts."""

from collections import Counter
from typing import Any

from tsdkd.stages.eval.harness import weighted_mean
from tsdkd.stages.results.benchmarks import Benchmark


def summarize(benchmark: Benchmark, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means, standard errors and counts of a benchmark, as the results' summary keeps them."""
    by_metric: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_metric.setdefault(row["metric"], []).append(row)
    headline = by_metric[benchmark.metric]
    value, stderr = weighted_mean(headline)
    verdicts = [row["verdict"] for row in headline if row["verdict"]]
    programs = {
        "sandbox_limits": dict(sorted(Counter(verdict.limit for verdict in verdicts if verdict.limit).items())),
        "judged_by_objects": sum(verdict.judged_by_objects for verdict in verdicts),
    }
    return {
        "metric": benchmark.metric,
        "value": value,
        "stderr": stderr,
        "documents": len(headline),
        "other_metrics": {metric: list(weighted_mean(by_metric[metric])) for metric in benchmark.other_metrics},
        "shots": benchmark.shots,
        "truncated": sum(row["truncated"] for row in headline),
        "prompts_truncated": sum(row["prompt_truncated"] for row in headline),
        "stopped_by": dict(sorted(Counter(row["stop"] for row in headline if row["stop"]).items())),
        **(programs if verdicts else {}),
    }


def result_line(benchmark: Benchmark, result: dict[str, Any]) -> str:
    """A benchmark's result in words, with the responses that their limit or a stop string ended."""
    error = "" if result["stderr"] is None else f" ± {100 * result['stderr']:.1f}"
    line = f"{benchmark.name}: {100 * result['value']:.1f}{error} % of {result['documents']:,} documents"
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
