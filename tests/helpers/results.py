"""Results artifacts with given scores, made without models, to test comparisons."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from tsdkd.artifacts.manifest import Manifest, ModelRecord
from tsdkd.artifacts.reader import Artifact
from tsdkd.artifacts.schemas import schema_of
from tsdkd.artifacts.writer import Writer
from tsdkd.stages.eval.harness import weighted_mean
from tsdkd.stages.eval.summary import average_samples, pass_at
from tsdkd.stages.results.benchmarks import BENCHMARKS

Scores = dict[str, list[tuple[float, float]]]
"""By benchmark: score and weight of each document."""
METRICS = {"gsm8k": "exact_match,flexible-extract", "ifeval": "inst_level_strict_acc,none"}


def results(
    directory: Path, scores: Scores, model: str = "m", first: int = 0, samples: int = 1, response: str = ""
) -> Artifact:
    """A results artifact with these scores; documents are numbered from `first`, and each has so many in a row."""
    summary, schema = {}, schema_of("results", ["sample"])
    manifest = Manifest(kind="results", config={}, seed=0, models=(ModelRecord("evaluated", model, "w", "t", "c"),))
    with Writer.open(directory, manifest) as writer:
        for name, documents in scores.items():
            rows: list[dict[str, Any]] = [
                {
                    "task": name,
                    "subtask": name,
                    "document": first + i // samples,
                    "document_hash": str(first + i // samples),
                    "sample": i % samples,
                    "metric": METRICS.get(name, "acc,none"),
                    "prompt": f"An example.\nQuestion {first + i // samples}?\nAnswer:",
                    "response": response,
                    "target": f"target {first + i // samples}",
                    "truncated": False,
                    "score": s,
                    "weight": w,
                }
                for i, (s, w) in enumerate(documents)
            ]
            table = [{**dict.fromkeys(schema.names), **row} for row in rows]
            writer.write_table(f"{BENCHMARKS[name].file_stem}.parquet", pa.Table.from_pylist(table, schema))
            value, stderr = weighted_mean(average_samples(rows))
            summary[name] = {
                "metric": METRICS.get(name, "acc,none"),
                "value": value,
                "stderr": stderr,
                "documents": len(rows) // samples,
                "samples": samples,
                "pass_at": pass_at(rows) if samples > 1 else {},
                "truncated": 0,
                "prompts_truncated": 0,
            }
        return writer.finish(summary)


def binary_scores(digits: str) -> list[tuple[float, float]]:
    return [(float(digit), 1.0) for digit in digits]
