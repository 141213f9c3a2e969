"""score: rollouts -> scores. Both models read every response once; what TSD-KD asks of them is written down.

Parts of the scores are those of the rollouts, and each depends on its own responses alone: several processes share the
parts out as they come, and write what one process would. While one block of responses is read, the one before is
written.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pyarrow as pa

from tsdkd.artifacts.manifest import Manifest, Part, load_manifest
from tsdkd.artifacts.reader import Artifact, read_artifact
from tsdkd.artifacts.writer import TableWriter, Writer
from tsdkd.errors import InputError, TsdkdError
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.score_cost import (
    ScoreWorkload,
    format_bytes,
    score_batches,
    score_blocks,
    score_cost,
    score_workload,
    sequence_lengths,
)
from tsdkd.stages.data.scoring import ModelPair, ScoreRow, score_responses
from tsdkd.stages.data.teacher_signals import HEAD_FILE, SIGNALS_WITH_HEAD, save_head, score_table
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.record import library_versions, model_record, require_same_tokenizer
from tsdkd.stages.models.tokenizers import load_tokenizer, vocab_size
from tsdkd.stages.observer import Observer, SilentObserver
from tsdkd.stages.score.background import BackgroundWriter
from tsdkd.stages.score.ranks import Ranks
from tsdkd.stages.score.summary import summarise

PROBE_TOKENS = 2048
"""What the rate is measured on."""
IDS = ["sample_id", "prompt_ids", "response_ids"]


def score(
    rollouts: Path,
    student: str,
    teacher: str,
    output: Path,
    config: ScoreConfig,
    observer: Observer | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Let both models read a rollouts artifact. Raises InputError before anything is written."""
    observer = observer or SilentObserver()
    team = Ranks()
    prepare = partial(_manifest, rollouts, student, teacher, output, config, observer)
    with team.open(output, prepare, overwrite) as writer, observer.writing(output):
        if writer.complete:
            observer.info(f"{output} is complete: nothing to do.")
            return writer.artifact
        parent = read_artifact(rollouts, "rollouts", hashed=False)
        todo = [part for part in parent.tables if not writer.has(part.file)]
        if todo:
            device_map = None if config.device_map == "one" else config.device_map
            loaded = [load_model(name, config.dtype, device_map=device_map) for name in (student, teacher)]
            readers = loaded[0], loaded[1]
            if team.first:
                _state_cost(readers, parent, todo, config, team.count, output, observer)
            team.wait()
            _read_parts(readers, parent, writer, config, observer)
        team.wait()
        if team.first:
            writer.finish(summarise(Artifact(output, load_manifest(output)), parent, config))
        team.wait()
        return read_artifact(output, "scores", hashed=False)


def _manifest(
    rollouts: Path, student: str, teacher: str, output: Path, config: ScoreConfig, observer: Observer
) -> Manifest:
    """Raises InputError where models, rollouts and configuration do not go together."""
    if config.device_map != "one" and Ranks().count > 1:
        raise InputError(
            "--device-map spreads a model of one process, but there are several.",
            "Start a single process, or leave out --device-map.",
        )
    parent = read_artifact(rollouts, "rollouts")
    models = model_record("student", student), model_record("teacher", teacher)
    require_same_tokenizer(*models)
    _require_candidates(config, vocab_size(load_tokenizer(student)))
    for author in parent.manifest.models:
        require_same_tokenizer(author, models[0])
        reader = next(model for model in models if model.role == author.role)
        if author.weights != reader.weights:
            observer.warning(
                f"The rollouts come from another {author.role} ({author.name}) than the one that reads them."
            )
    return Manifest(
        kind="scores",
        config={name: value for name, value in asdict(config).items() if name != "device_map"},
        seed=parent.manifest.seed,
        parents=(parent.as_parent_of(output),),
        models=models,
        libraries=library_versions(),
    )


def _require_candidates(config: ScoreConfig, vocab: int) -> None:
    for option, value in (("--k", config.k), ("--top-k", config.top_k if config.signal == "topk" else 0)):
        if value >= vocab:
            raise InputError(
                f"{option} is {value}, but the vocabulary has only {vocab} tokens.", f"Choose a smaller {option}."
            )


def _read_parts(readers: ModelPair, parent: Artifact, writer: Writer, config: ScoreConfig, observer: Observer) -> None:
    """Read whatever no other process has taken."""
    if config.signal in SIGNALS_WITH_HEAD and writer.claim(HEAD_FILE):
        save_head(readers[1].head, writer.aside(HEAD_FILE))
        writer.add_file(HEAD_FILE)
    shown = writer.manifest.rows
    with (
        observer.progress("both models read", parent.manifest.rows, "responses", shown) as advance,
        BackgroundWriter() as behind,
    ):
        for part in parent.tables:
            if not writer.claim(part.file):
                continue
            others = max(0, writer.manifest.rows - shown)
            advance(others)
            shown += others + (part.rows or 0)
            target = TableWriter(writer, part.file)
            for rows in _read_part(readers, parent.read_part(part, IDS), config, advance):
                behind(_write, target, rows)
            behind(target.close)


def _read_part(
    readers: ModelPair, table: pa.Table, config: ScoreConfig, advance: Callable[[int], None]
) -> Iterator[list[ScoreRow]]:
    """Rows of scores in order, block by block; within a block, sequences of similar length are read together."""
    found = sequence_lengths(table)
    for block in score_blocks(table, config, readers[1].head):
        rows: dict[int, ScoreRow] = {}
        for batch in score_batches(found, block, config):
            rows.update(zip(batch, score_responses(table.take(batch).to_pylist(), readers, config), strict=True))
            advance(len(batch))
        yield [rows[i] for i in block]


def _write(target: TableWriter, rows: list[ScoreRow]) -> None:
    for row in rows:  # one response per row group: training reads single rows in random order
        target.write(score_table(row))


def _state_cost(
    readers: ModelPair,
    parent: Artifact,
    todo: list[Part],
    config: ScoreConfig,
    processes: int,
    output: Path,
    observer: Observer,
) -> None:
    """Tell bytes, padding and expected time; raise TsdkdError when the disk is too small."""
    load = ScoreWorkload()
    for part in todo:
        load += score_workload(parent.read_part(part, IDS), config, readers[1].head)
    total = score_cost(config, readers[1].head, load.response_tokens)
    free = shutil.disk_usage(output).free
    minutes = load.tokens / _rate(readers, parent.read_part(todo[0], IDS), config) / processes / 60
    observer.table(
        "What scoring will cost",
        [
            *total.rows(),
            ("free on disk", format_bytes(free)),
            ("tokens to read", f"{load.tokens:,} and {load.padding:.1%} padding"),
            ("expected time", f"{minutes:,.1f} min" + (f" in {processes} processes" if processes > 1 else "")),
        ],
    )
    if total.bytes > free:
        raise TsdkdError(
            f"Scores need {format_bytes(total.bytes)}, but {output} has {format_bytes(free)} free.",
            "Free space, choose another --scores directory, or use --signal hidden8 or topk.",
        )


def _rate(readers: ModelPair, table: pa.Table, config: ScoreConfig) -> float:
    """Tokens per second of a small batch, after a smaller one that warms up."""
    found, small = sequence_lengths(table), replace(config, batch_tokens=min(config.batch_tokens, PROBE_TOKENS))
    *_, shortest = longest, *_ = list(score_batches(found, range(len(found)), small))
    seconds = 0.0
    for batch in (shortest[:1], longest):
        start = time.perf_counter()
        score_responses(table.take(batch).to_pylist(), readers, config)
        seconds = time.perf_counter() - start
    return sum(found[i] for i in longest) / seconds
