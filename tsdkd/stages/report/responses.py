"""Responses side by side: student and distilled model on the same documents, and several runs on the same prompts."""

import random
from dataclasses import dataclass
from typing import TypeVar

import pyarrow.compute as pc

from tsdkd.artifacts.reader import Artifact
from tsdkd.stages.report.runs import Run
from tsdkd.stages.results.benchmarks import BENCHMARKS
from tsdkd.stages.results.compare import document_scores

BEFORE, AFTER = "student", "distilled"
MAX_EXAMPLES = 3
"""Of gained documents, of lost documents, and of shared prompts."""
MAX_CHARACTERS = 1500
"""Shown of a text."""
Document = tuple[str, int, str]
"""Subtask, number and hash."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ComparedResponse:
    """A response by one model or run."""

    author: str
    text: str
    verdict: str = ""
    """"correct", "wrong" or a score; empty without a reference."""


@dataclass(frozen=True, slots=True)
class ResponseComparison:
    """Several responses to one prompt."""

    title: str
    prompt: str
    responses: tuple[ComparedResponse, ...]
    reference: str = ""


def compare_before_and_after(run: Run) -> list[ResponseComparison] | None:
    """Benchmark documents that training gained and lost, drawn with a fixed seed; None without a common document."""
    before, after = (run.named(f"results/{name}") for name in (BEFORE, AFTER))
    if not (before and after and before.readable and after.readable):
        return None
    results = before.as_artifact(), after.as_artifact()
    changed: dict[str, list[tuple[str, Document]]] = {"Gained": [], "Lost": []}
    common_documents = 0
    for benchmark in BENCHMARKS:
        if all(benchmark in result.manifest.summary for result in results):
            scores_before, scores_after = (document_scores(result, benchmark) for result in results)
            common = sorted(scores_before.keys() & scores_after.keys())
            common_documents += len(common)
            for document in common:
                old, new = scores_before[document][0], scores_after[document][0]
                if old != new:
                    changed["Gained" if new > old else "Lost"].append((benchmark, document))
    if not common_documents:
        return None
    return [
        _compare_document(results, benchmark, document, change)
        for change, documents in changed.items()
        for benchmark, document in _draw(documents)
    ]


def compare_rollouts(runs: list[Run]) -> list[ResponseComparison]:
    """Responses of several runs' rollouts to prompts that all of them have."""
    rollouts = {
        run.name: artifact.as_artifact() for run in runs if (artifact := run.named("rollouts")) and artifact.readable
    }
    if len(rollouts) < 2:
        return []
    prompt_ids = [
        {id_ for part in artifact.tables for id_ in artifact.read_part(part, ["prompt_id"])[0].to_pylist()}
        for artifact in rollouts.values()
    ]
    drawn = _draw(sorted(set.intersection(*prompt_ids)))
    first_responses = {name: _read_first_responses(artifact, drawn) for name, artifact in rollouts.items()}
    first_run = next(iter(first_responses.values()))
    return [
        ResponseComparison(
            f"Prompt {id_}",
            truncate(first_run[id_][0]),
            tuple(ComparedResponse(name, truncate(texts[id_][1])) for name, texts in first_responses.items()),
        )
        for id_ in drawn
    ]


def truncate(text: str) -> str:
    """The end of a long text, which holds a prompt's question and a response's result."""
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"[{len(text) - MAX_CHARACTERS:,} characters omitted]…{text[-MAX_CHARACTERS:]}"


def _draw(items: list[T]) -> list[T]:
    return random.Random(0).sample(items, min(MAX_EXAMPLES, len(items)))


def _compare_document(
    results: tuple[Artifact, Artifact], benchmark: str, document: Document, change: str
) -> ResponseComparison:
    rows = [read_document(result, benchmark, document) for result in results]
    responses = tuple(
        ComparedResponse(author, truncate(str(row["response"])), format_verdict(float(str(row["score"]))))
        for author, row in zip((BEFORE, AFTER), rows, strict=True)
    )
    title = f"{change}: {benchmark}, document {document[1]} of {document[0]}"
    return ResponseComparison(title, truncate(str(rows[0]["prompt"])), responses, truncate(str(rows[0]["target"])))


def read_document(results: Artifact, benchmark: str, document: Document) -> dict[str, object]:
    """The row of a document's first sample by the headline metric."""
    part = results.table_part(f"{BENCHMARKS[benchmark].file_stem}.parquet")
    subtask, number, hash_ = document
    condition = (
        (pc.field("subtask") == subtask) & (pc.field("document") == number) & (pc.field("document_hash") == hash_)
    )
    columns = ["subtask", "document", "document_hash", "metric", "prompt", "response", "target", "score", "truncated"]
    condition &= pc.field("metric") == results.manifest.summary[benchmark]["metric"]
    row = results.read_part(part, columns, condition).to_pylist()[0]
    return dict(row)


def _read_first_responses(rollouts: Artifact, prompt_ids: list[str]) -> dict[str, tuple[str, str]]:
    """The last message and the first response of each prompt."""
    texts: dict[str, tuple[str, str]] = {}
    columns, condition = ["prompt_id", "messages", "response"], pc.field("prompt_id").isin(prompt_ids)
    for part in rollouts.tables:
        for row in rollouts.read_part(part, columns, condition).to_pylist():
            texts.setdefault(row["prompt_id"], (row["messages"][-1]["content"], row["response"]))
    return texts


def format_verdict(score: float) -> str:
    """A score in a word; a score between wrong and correct as a number."""
    return {0.0: "wrong", 1.0: "correct"}.get(score, f"{score:.2f}")
