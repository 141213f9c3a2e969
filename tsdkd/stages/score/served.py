"""score with a served teacher: rollouts -> scores. The student is read here, the teacher by its server.

One process sends requests, as many at a time as the user allows. Each part of the rollouts becomes one part of the
scores, so a killed run continues with the first part that is missing.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from tsdkd.artifacts.locks import reading_inputs
from tsdkd.artifacts.manifest import Manifest, Part, load_manifest
from tsdkd.artifacts.reader import Artifact, read_artifact
from tsdkd.artifacts.writer import TableWriter, Writer
from tsdkd.core import Head
from tsdkd.errors import InputError, TsdkdError
from tsdkd.processes import world_size
from tsdkd.stages.config.generate import GIVEN
from tsdkd.stages.config.score import ScoreConfig, recorded_scoring, require_candidates
from tsdkd.stages.data.readable import require_readable
from tsdkd.stages.data.recorded_chat import chat_of_rollouts
from tsdkd.stages.data.rollout_lengths import LENGTH_COLUMNS, sequence_lengths
from tsdkd.stages.data.score_cost import (
    ScoreWorkload,
    format_bytes,
    score_batches,
    score_blocks,
    score_cost,
    score_workload,
)
from tsdkd.stages.data.scoring import ScoreRow, report_padded_reading
from tsdkd.stages.data.served_scoring import (
    SERVED_COLUMNS,
    read_request,
    require_captured_mass,
    student_scores,
    teacher_columns,
)
from tsdkd.stages.data.signal_storage import score_table
from tsdkd.stages.engines.choice import require_engine_options
from tsdkd.stages.models.attention import require_attention
from tsdkd.stages.models.load import LanguageModel, load_model
from tsdkd.stages.models.record import library_versions, model_record, require_same_tokenizer
from tsdkd.stages.models.spec import ModelSpec, load_spec
from tsdkd.stages.observer import Observer, SilentObserver
from tsdkd.stages.score.summary import summarise
from tsdkd.stages.teacher_server.record import served_record
from tsdkd.stages.teacher_server.server import TeacherServer, open_server

COLUMNS = ["sample_id", *LENGTH_COLUMNS]
NO_HEAD = Head(torch.empty(0, 0, device="meta"))
"""The teacher's head, whose size decides nothing here."""
TIMED_SEQUENCES = 16


@reading_inputs()
def score_served(
    rollouts: Path,
    student: str,
    url: str,
    teacher: str | None,
    output: Path,
    config: ScoreConfig,
    observer: Observer | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Score rollouts with a student and the teacher that a server at `url` serves.

    `teacher`: the model's name at the server, needed where it serves several.

    Raises InputError before anything is written, TsdkdError when the server fails; what is complete is kept.
    """
    observer = observer or SilentObserver()
    _require_supported(config)
    parent, spec = read_artifact(rollouts, "rollouts"), load_spec(student)
    require_attention(config.attention, (student,))
    require_readable(parent, [spec])
    require_candidates(config, spec.vocab)
    with open_server(
        url, teacher, spec.tokenizer, vocab=spec.vocab, top_k=config.top_k, k=config.k, observer=observer
    ) as server:
        server.require_length(max(max(_lengths(parent, part)) for part in parent.tables))
        manifest = _manifest(parent, student, server, output, config, observer)
        with Writer.open(output, manifest, overwrite=overwrite) as writer, observer.writing(writer.path):
            if writer.complete:
                observer.info(f"{output} is complete: nothing to do.")
                return writer.artifact
            missing = [part for part in parent.tables if not writer.has(part.file)]
            if missing:
                _score_parts(_load_student(spec, config, observer), server, parent, missing, writer, config, observer)
            written = Artifact(writer.path, load_manifest(writer.path))
            writer.finish(summarise(written, parent, config), observer.info)
        return read_artifact(output, "scores", hashed=False)


def _require_supported(config: ScoreConfig) -> None:
    if config.signal not in {"topk", "ranks"}:
        raise InputError(
            f"A server gives no hidden states, which --signal {config.signal} needs.",
            "Give --signal topk, or --signal ranks.",
        )
    if config.engine != "transformers":
        raise InputError(
            f"With --teacher-url, transformers reads the student, not {config.engine}.", "Leave out --engine."
        )
    require_engine_options(config.engine, config)
    if world_size() > 1:
        raise InputError("--teacher-url works with a single process only.", "Start one process.")


def _manifest(
    parent: Artifact, student: str, server: TeacherServer, output: Path, config: ScoreConfig, observer: Observer
) -> Manifest:
    chat = chat_of_rollouts(parent, config.chat) if parent.manifest.models[0].role == "student" else None
    learner = model_record("student", student, chat=chat)
    models = learner, served_record(server, learner, output)
    for author in parent.manifest.models:
        require_same_tokenizer(author, learner)
        given = parent.manifest.config["policy"] == GIVEN
        if author.role == "student" and author.weights != learner.weights and not given:
            observer.warning(f"Another student sampled the rollouts: {author.name}.")
    return Manifest(
        kind="scores",
        config=recorded_scoring(config),
        seed=parent.manifest.seed,
        parents=(parent.as_parent_of(output),),
        models=models,
        engine="server",
        libraries=library_versions(),
    )


def _load_student(spec: ModelSpec, config: ScoreConfig, observer: Observer) -> LanguageModel:
    device_map = None if config.device_map == "one" else config.device_map
    settings: Any = {"device_map": device_map, "attention": config.attention, "observer": observer}
    student = replace(load_model(spec.name, config.dtype, **settings), shared_vocab=spec.vocab)
    report_padded_reading([student], observer)
    return student


def _score_parts(
    student: LanguageModel,
    server: TeacherServer,
    parent: Artifact,
    missing: list[Part],
    writer: Writer,
    config: ScoreConfig,
    observer: Observer,
) -> None:
    first = parent.read_part(missing[0], COLUMNS)
    _report_cost(server, parent, missing, first, writer.path, config, observer)
    rows = parent.manifest.rows
    with observer.progress("student and server score", rows, "responses", writer.manifest.rows) as advance:
        for part in missing:
            table = parent.read_part(part, COLUMNS)
            table_writer = TableWriter(writer, part.file, SERVED_COLUMNS)
            for scored in _score_blocks(student, server, table, config, advance):
                for row in scored:  # one response per row group, because training reads rows in random order
                    table_writer.write(score_table(row))
            table_writer.close()


def _score_blocks(
    student: LanguageModel, server: TeacherServer, table: pa.Table, config: ScoreConfig, advance: Callable[[int], None]
) -> Iterator[list[ScoreRow]]:
    """Yield rows of scores in order, block by block; the server reads the sequences of a block together."""
    lengths = sequence_lengths(table)
    for block in score_blocks(table, config, NO_HEAD):
        rows: dict[int, ScoreRow] = {}
        for batch in score_batches(lengths, block, config):
            rows.update(zip(batch, student_scores(table.take(batch).to_pylist(), student, config.k), strict=True))
        sequences = table.take(list(block)).to_pylist()
        requests = [read_request(row, rows[i]["candidates"]) for i, row in zip(block, sequences, strict=True)]
        readings = server.read(requests, advance)
        require_captured_mass(readings, config.top_k)
        yield [
            rows[i] | teacher_columns(reading, student.vocab, config)
            for i, reading in zip(block, readings, strict=True)
        ]


def _report_cost(
    server: TeacherServer,
    parent: Artifact,
    missing: list[Part],
    first: pa.Table,
    directory: Path,
    config: ScoreConfig,
    observer: Observer,
) -> None:
    """Report bytes, tokens and the server's time of the missing parts. Raises TsdkdError when the disk is too small."""
    workload = ScoreWorkload()
    for part in missing:
        workload += score_workload(parent.read_part(part, LENGTH_COLUMNS))
    cost, free = score_cost(config, NO_HEAD, workload.response_tokens), shutil.disk_usage(directory).free
    timed = [read_request(row) for row in first.slice(0, TIMED_SEQUENCES).to_pylist()]
    start = time.perf_counter()
    require_captured_mass(server.read(timed), config.top_k)
    rate = sum(len(request.ids) for request in timed) / (time.perf_counter() - start)
    observer.table(
        "Cost of scoring",
        [
            *cost.rows(),
            ("free on disk", format_bytes(free)),
            ("tokens to read", f"{workload.tokens:,}"),
            ("expected time of the server", f"{workload.tokens / rate / 60:,.1f} min"),
        ],
    )
    if cost.bytes > free:
        raise TsdkdError(
            f"Scores need {format_bytes(cost.bytes)}, but {directory} has {format_bytes(free)} free.",
            "Free space, choose another --scores directory, or use a smaller --top-k.",
        )


def _lengths(parent: Artifact, part: Part) -> list[int]:
    return sequence_lengths(parent.read_part(part, LENGTH_COLUMNS))
