"""score: rollouts -> scores. Both models read every response once; what TSD-KD asks of them is written down.

Parts of the scores are those of the rollouts, and each depends on its own responses alone: several processes share the
parts out as they come, and write what one process would. While one block of responses is read, the one before is
written.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from tsdkd.artifacts import Artifact, Manifest, Part, load_manifest, read
from tsdkd.errors import InputError, TsdkdError
from tsdkd.stages.config import ScoreConfig
from tsdkd.stages.models import describe, libraries, load_model, load_tokenizer, require_same_tokenizer, vocab_size
from tsdkd.stages.reporter import Reporter, Silent
from tsdkd.stages.samples.signals import HEAD_FILE, NEEDS_HEAD, as_table, save_head
from tsdkd.stages.scoring.cost import Load, batches, blocks, cost, in_words, lengths, workload
from tsdkd.stages.scoring.processes import Processes
from tsdkd.stages.scoring.summary import summarise
from tsdkd.stages.scoring.views import Readers, Row, read_responses
from tsdkd.writer import TablePart, Writer

PROBE_TOKENS = 2048
"""What the rate is measured on."""
IDS = ["sample_id", "prompt_ids", "response_ids"]


def score(
    rollouts: Path,
    student: str,
    teacher: str,
    output: Path,
    config: ScoreConfig,
    reporter: Reporter | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Let both models read a rollouts artifact. Raises InputError before anything is written."""
    reporter = reporter or Silent()
    team = Processes()
    prepare = partial(_manifest, rollouts, student, teacher, output, config, reporter)
    with team.open(output, prepare, overwrite) as writer, reporter.writing(output):
        if writer.complete:
            reporter.say(f"{output} is complete: nothing to do.")
            return writer.artifact
        parent = read(rollouts, "rollouts", hashed=False)
        todo = [part for part in parent.tables if not writer.has(part.file)]
        if todo:
            device_map = None if config.device_map == "one" else config.device_map
            loaded = [load_model(name, config.dtype, device_map=device_map) for name in (student, teacher)]
            readers = loaded[0], loaded[1]
            if team.first:
                _state_cost(readers, parent, todo, config, team.count, output, reporter)
            team.wait()
            _read_parts(readers, parent, writer, config, reporter)
        team.wait()
        if team.first:
            writer.finish(summarise(Artifact(output, load_manifest(output)), parent, config))
        team.wait()
        return read(output, "scores", hashed=False)


def _manifest(
    rollouts: Path, student: str, teacher: str, output: Path, config: ScoreConfig, reporter: Reporter
) -> Manifest:
    """Raises InputError where models, rollouts and configuration do not go together."""
    if config.device_map != "one" and Processes().count > 1:
        raise InputError(
            "--device-map spreads a model of one process, but there are several.",
            "Start a single process, or leave out --device-map.",
        )
    parent = read(rollouts, "rollouts")
    models = describe("student", student), describe("teacher", teacher)
    require_same_tokenizer(*models)
    _require_candidates(config, vocab_size(load_tokenizer(student)))
    for author in parent.manifest.models:
        require_same_tokenizer(author, models[0])
        reader = next(model for model in models if model.role == author.role)
        if author.weights != reader.weights:
            reporter.warn(f"The rollouts come from another {author.role} ({author.name}) than the one that reads them.")
    return Manifest(
        kind="scores",
        config={name: value for name, value in asdict(config).items() if name != "device_map"},
        seed=parent.manifest.seed,
        parents=(parent.as_parent_of(output),),
        models=models,
        libraries=libraries(),
    )


def _require_candidates(config: ScoreConfig, vocab: int) -> None:
    for option, value in (("--k", config.k), ("--top-k", config.top_k if config.signal == "topk" else 0)):
        if value >= vocab:
            raise InputError(
                f"{option} is {value}, but the vocabulary has only {vocab} tokens.", f"Choose a smaller {option}."
            )


def _read_parts(readers: Readers, parent: Artifact, writer: Writer, config: ScoreConfig, reporter: Reporter) -> None:
    """Read whatever no other process has taken."""
    if config.signal in NEEDS_HEAD and writer.claim(HEAD_FILE):
        save_head(readers[1].head, writer.aside(HEAD_FILE))
        writer.add_file(HEAD_FILE)
    shown = writer.manifest.rows
    with reporter.progress("both models read", parent.manifest.rows, "responses", shown) as advance, Behind() as behind:
        for part in parent.tables:
            if not writer.claim(part.file):
                continue
            others = max(0, writer.manifest.rows - shown)
            advance(others)
            shown += others + (part.rows or 0)
            target = TablePart(writer, part.file)
            for rows in _read_part(readers, parent.read_part(part, IDS), config, advance):
                behind(_write, target, rows)
            behind(target.close)


def _read_part(
    readers: Readers, table: pa.Table, config: ScoreConfig, advance: Callable[[int], None]
) -> Iterator[list[Row]]:
    """Rows of scores in order, block by block; within a block, sequences of similar length are read together."""
    found = lengths(table)
    for block in blocks(table, config, readers[1].head):
        rows: dict[int, Row] = {}
        for batch in batches(found, block, config):
            rows.update(zip(batch, read_responses(table.take(batch).to_pylist(), readers, config), strict=True))
            advance(len(batch))
        yield [rows[i] for i in block]


def _write(target: TablePart, rows: list[Row]) -> None:
    for row in rows:  # one response per row group: training reads single rows in random order
        target.write(as_table(row))


class Behind:
    """Does one thing after the other in a thread of its own; a call waits for the one before, and raises its error."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __call__(self, work: Callable[..., None], *arguments: Any) -> None:
        self._wait()
        self._last = self._thread.submit(work, *arguments)

    def _wait(self) -> None:
        if self._last:
            self._last.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if not error:
            self._wait()


def _state_cost(
    readers: Readers,
    parent: Artifact,
    todo: list[Part],
    config: ScoreConfig,
    processes: int,
    output: Path,
    reporter: Reporter,
) -> None:
    """Tell bytes, padding and expected time; raise TsdkdError when the disk is too small."""
    load = Load()
    for part in todo:
        load += workload(parent.read_part(part, IDS), config, readers[1].head)
    total = cost(config, readers[1].head, load.response_tokens)
    free = shutil.disk_usage(output).free
    minutes = load.tokens / _rate(readers, parent.read_part(todo[0], IDS), config) / processes / 60
    reporter.table(
        "What scoring will cost",
        [
            *total.rows(),
            ("free on disk", in_words(free)),
            ("tokens to read", f"{load.tokens:,} and {load.padding:.1%} padding"),
            ("expected time", f"{minutes:,.1f} min" + (f" in {processes} processes" if processes > 1 else "")),
        ],
    )
    if total.bytes > free:
        raise TsdkdError(
            f"Scores need {in_words(total.bytes)}, but {output} has {in_words(free)} free.",
            "Free space, choose another --scores directory, or use --signal hidden8 or topk.",
        )


def _rate(readers: Readers, table: pa.Table, config: ScoreConfig) -> float:
    """Tokens per second of a small batch, after a smaller one that warms up."""
    found, small = lengths(table), replace(config, batch_tokens=min(config.batch_tokens, PROBE_TOKENS))
    *_, shortest = longest, *_ = list(batches(found, range(len(found)), small))
    seconds = 0.0
    for batch in (shortest[:1], longest):
        start = time.perf_counter()
        read_responses(table.take(batch).to_pylist(), readers, config)
        seconds = time.perf_counter() - start
    return sum(found[i] for i in longest) / seconds
