"""A few answers side by side: the student's before and after on the same documents, and runs' to the same prompts."""

import random
from dataclasses import dataclass
from typing import TypeVar

import pyarrow.compute as pc
import pyarrow.parquet as pq

from tsdkd.artifacts.reader import Artifact
from tsdkd.stages.report.runs import Run
from tsdkd.stages.results.benchmarks import BENCHMARKS
from tsdkd.stages.results.compare import document_scores

BEFORE, AFTER = "student", "distilled"
EACH = 3
"""Documents that were gained, and that were lost; prompts that runs share."""
LONGEST = 1500
"""Characters of a text that are shown."""
Document = tuple[str, int, str]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model said; `verdict` is "right", "wrong", a score, or nothing where nobody judged."""

    who: str
    text: str
    verdict: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """Answers to one prompt."""

    title: str
    prompt: str
    answers: tuple[Answer, ...]
    target: str = ""


def before_and_after(run: Run) -> list[Sample] | None:
    """Benchmark documents that training gained and lost, drawn with a fixed seed; None where both answered none."""
    before, after = (run.piece(f"results/{name}") for name in (BEFORE, AFTER))
    if not (before and after and before.readable and after.readable):
        return None
    models = before.artifact, after.artifact
    changed: dict[str, list[tuple[str, Document]]] = {"Gained": [], "Lost": []}
    both = 0
    for benchmark in BENCHMARKS:
        if all(benchmark in model.manifest.summary for model in models):
            then, now = (document_scores(model, benchmark) for model in models)
            common = sorted(then.keys() & now.keys())
            both += len(common)
            for document in common:
                old, new = then[document][0], now[document][0]
                if old != new:
                    changed["Gained" if new > old else "Lost"].append((benchmark, document))
    if not both:
        return None
    return [_judged(models, *one, how) for how, found in changed.items() for one in _drawn(found)]


def of_runs(runs: list[Run]) -> list[Sample]:
    """What the rollouts of several runs say to prompts that all of them have."""
    pieces = {run.name: piece for run in runs if (piece := run.piece("rollouts")) and piece.readable}
    if len(pieces) < 2:
        return []
    prompts = [
        {id_ for part in piece.artifact.tables for id_ in piece.artifact.read_part(part, ["prompt_id"])[0].to_pylist()}
        for piece in pieces.values()
    ]
    chosen = _drawn(sorted(set.intersection(*prompts)))
    said = {name: _responses(piece.artifact, chosen) for name, piece in pieces.items()}
    return [
        Sample(
            f"Prompt {id_}",
            short(said[next(iter(said))][id_][0]),
            tuple(Answer(name, short(found[id_][1])) for name, found in said.items()),
        )
        for id_ in chosen
    ]


def short(text: str) -> str:
    """The end of a long text: that is where a prompt asks, and where an answer ends."""
    return text if len(text) <= LONGEST else f"[{len(text) - LONGEST:,} characters before]…{text[-LONGEST:]}"


def _drawn(from_: list[T]) -> list[T]:
    return random.Random(0).sample(from_, min(EACH, len(from_)))


def _judged(models: tuple[Artifact, Artifact], benchmark: str, document: Document, how: str) -> Sample:
    rows = [_row(model, benchmark, document) for model in models]
    answers = tuple(
        Answer(who, short(str(row["response"])), _verdict(float(str(row["score"]))))
        for who, row in zip((BEFORE, AFTER), rows, strict=True)
    )
    title = f"{how}: {benchmark}, document {document[1]} of {document[0]}"
    return Sample(title, short(str(rows[0]["prompt"])), answers, short(str(rows[0]["target"])))


def _row(model: Artifact, benchmark: str, document: Document) -> dict[str, object]:
    file = model.path / f"{BENCHMARKS[benchmark].file_stem}.parquet"
    subtask, number, hash_ = document
    wanted = (pc.field("subtask") == subtask) & (pc.field("document") == number) & (pc.field("document_hash") == hash_)
    wanted &= pc.field("metric") == model.manifest.summary[benchmark]["metric"]
    (row,) = pq.read_table(file, filters=wanted).to_pylist()
    return dict(row)


def _responses(rollouts: Artifact, prompts: list[str]) -> dict[str, tuple[str, str]]:
    """The last message and the first response of each prompt."""
    found: dict[str, tuple[str, str]] = {}
    for part in rollouts.tables:
        columns, wanted = ["prompt_id", "messages", "response"], pc.field("prompt_id").isin(prompts)
        for row in pq.read_table(rollouts.path / part.file, columns=columns, filters=wanted).to_pylist():
            found.setdefault(row["prompt_id"], (row["messages"][-1]["content"], row["response"]))
    return found


def _verdict(score: float) -> str:
    return {0.0: "wrong", 1.0: "right"}.get(score, f"{score:.2f}")
