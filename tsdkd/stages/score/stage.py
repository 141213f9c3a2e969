"""score: rollouts -> scores. Both models read each response once; the scores hold the values that training needs.

Each part of the rollouts becomes one part of the scores, which depends on no other part: ranks claim parts one by one,
and write the bytes that one process would write. While the models read one block of responses, a thread writes the
previous block.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from tsdkd.artifacts.files import HEAD_FILE
from tsdkd.artifacts.locks import reading_inputs
from tsdkd.artifacts.manifest import Manifest, Part, load_manifest
from tsdkd.artifacts.reader import Artifact, read_artifact
from tsdkd.artifacts.writer import TableWriter, Writer
from tsdkd.errors import InputError, TsdkdError
from tsdkd.processes import world_size
from tsdkd.stages.config.generate import GIVEN
from tsdkd.stages.config.score import ScoreConfig, recorded_scoring, require_candidates
from tsdkd.stages.data.offline import TEACHER_END_IDS
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
from tsdkd.stages.data.scoring import ModelPair, ScoreRow, report_padded_reading, score_in_turn, score_responses
from tsdkd.stages.data.signal_storage import SIGNALS_WITH_HEAD, save_head, score_table
from tsdkd.stages.engines.choice import engine_version, require_engine_options, require_vllm
from tsdkd.stages.models.attention import require_attention
from tsdkd.stages.models.load import load_model, share_vocab
from tsdkd.stages.models.record import library_versions, model_record, require_same_template, require_same_tokenizer
from tsdkd.stages.models.spec import load_spec
from tsdkd.stages.observer import Observer, SilentObserver
from tsdkd.stages.score.background import BackgroundWriter
from tsdkd.stages.score.distributed import RankGroup
from tsdkd.stages.score.summary import summarise

PROBE_TOKENS = 2048
"""Tokens of the batch that the rate is measured on."""
COLUMNS = ["sample_id", *LENGTH_COLUMNS]


@reading_inputs()
def score(
    rollouts: Path,
    student: str,
    teacher: str,
    output: Path,
    config: ScoreConfig,
    observer: Observer | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Score rollouts with a student and a teacher.

    Raises InputError before anything is written, TsdkdError when the disk is too small.
    """
    observer = observer or SilentObserver()
    ranks = RankGroup()
    prepare = partial(_manifest, rollouts, student, teacher, output, config, observer)
    with ranks.open_writer(output, prepare, overwrite) as writer, observer.writing(writer.path):
        if writer.complete:
            observer.info(f"{output} is complete: nothing to do.")
            return writer.artifact
        parent = read_artifact(rollouts, "rollouts", hashed=False)
        missing = [part for part in parent.tables if not writer.has(part.file)]
        if missing:
            with _open_models(student, teacher, parent, missing[0], config, observer) as models:
                if ranks.is_main:
                    _report_cost(models, parent, missing, config, writer.path, observer)
                ranks.wait()
                _score_parts(models, parent, writer, config, observer)
        ranks.wait()
        if ranks.is_main:
            written = Artifact(writer.path, load_manifest(writer.path))
            writer.finish(summarise(written, parent, config), observer.info)
        ranks.wait()
        return read_artifact(output, "scores", hashed=False)


def _manifest(
    rollouts: Path, student: str, teacher: str, output: Path, config: ScoreConfig, observer: Observer
) -> Manifest:
    """The manifest of the scores. Raises InputError where models, rollouts and config do not fit together."""
    require_engine_options(config.engine, config)
    if config.engine == "vllm":
        require_vllm()
        if world_size() > 1:
            raise InputError(
                "--engine vllm works with a single process only.",
                "Start one process; --tensor-parallel uses more GPUs.",
            )
    if config.device_map != "one" and world_size() > 1:
        raise InputError(
            "--device-map works with a single process only.", "Start one process, or leave out --device-map."
        )
    parent = read_artifact(rollouts, "rollouts")
    chat, template_role = chat_of_rollouts(parent, config.chat), parent.manifest.models[0].role
    models = tuple(
        model_record(role, name, chat=chat if role == template_role else None)
        for role, name in (("student", student), ("teacher", teacher))
    )
    require_same_tokenizer(*models)
    require_attention(config.attention, (student, teacher))
    specs = load_spec(student), load_spec(teacher)
    require_candidates(config, min(spec.vocab for spec in specs))
    require_readable(parent, specs)
    for author in parent.manifest.models:
        require_same_tokenizer(author, models[0])
        scorer = next(model for model in models if model.role == author.role)
        if author.role == template_role:
            require_same_template(author, scorer)
        if author.weights != scorer.weights and parent.manifest.config["policy"] != GIVEN:
            observer.warning(f"Another {author.role} sampled the rollouts: {author.name}.")
    return Manifest(
        kind="scores",
        config=recorded_scoring(config)
        | ({TEACHER_END_IDS: ends} if (ends := sorted({*specs[1].end_ids} - {*specs[0].end_ids})) else {}),
        seed=parent.manifest.seed,
        parents=(parent.as_parent_of(output),),
        models=models,
        engine=config.engine,
        libraries=library_versions() | (engine_version("vllm") if config.engine == "vllm" else {}),
    )


@contextmanager
def _open_models(
    student: str, teacher: str, parent: Artifact, first: Part, config: ScoreConfig, observer: Observer
) -> Iterator[ModelPair]:
    """Both models; vLLM's are checked on sequences of the part `first`."""
    if config.engine == "vllm":
        from tsdkd.stages.engines.vllm_reader import open_readers

        longest = max(max(sequence_lengths(parent.read_part(part, LENGTH_COLUMNS))) for part in parent.tables)
        rows = parent.read_part(first, LENGTH_COLUMNS).to_pylist()
        sequences = [row["prompt_ids"] + row["response_ids"] for row in rows]
        with open_readers(student, teacher, config, longest, sequences, observer) as readers:
            yield readers
        return
    device_map = None if config.device_map == "one" else config.device_map
    settings: Any = {"device_map": device_map, "attention": config.attention, "observer": observer}
    models = share_vocab(load_model(student, config.dtype, **settings), load_model(teacher, config.dtype, **settings))
    report_padded_reading(models, observer)
    yield models


def _score_parts(models: ModelPair, parent: Artifact, writer: Writer, config: ScoreConfig, observer: Observer) -> None:
    """Score each part that no other rank has claimed."""
    if config.signal in SIGNALS_WITH_HEAD and writer.claim(HEAD_FILE):
        save_head(models[1].head, writer.temporary_path(HEAD_FILE))
        writer.add_file(HEAD_FILE)
    counted = writer.manifest.rows
    with (
        observer.progress("student and teacher score", parent.manifest.rows, "responses", counted) as advance,
        BackgroundWriter() as background,
    ):
        for part in parent.tables:
            if not writer.claim(part.file):
                continue
            by_others = max(0, writer.manifest.rows - counted)
            advance(by_others)
            counted += by_others + (part.rows or 0)
            table_writer = TableWriter(writer, part.file)
            for rows in _score_blocks(models, parent.read_part(part, COLUMNS), config, advance):
                background.submit(_write, table_writer, rows)
            background.submit(table_writer.close)


def _score_blocks(
    models: ModelPair, table: pa.Table, config: ScoreConfig, advance: Callable[[int], None]
) -> Iterator[list[ScoreRow]]:
    """Yield rows of scores in order, block by block; a batch holds sequences of similar length within one block."""
    lengths = sequence_lengths(table)
    for block in score_blocks(table, config, models[1].head):
        rows: dict[int, ScoreRow] = {}
        batches = list(score_batches(lengths, block, config))
        scored = score_in_turn((table.take(batch).to_pylist() for batch in batches), models, config)
        for batch, batch_rows in zip(batches, scored, strict=True):
            rows.update(zip(batch, batch_rows, strict=True))
            advance(len(batch))
        yield [rows[i] for i in block]


def _write(table_writer: TableWriter, rows: list[ScoreRow]) -> None:
    for row in rows:  # one response per row group, because training reads rows in random order
        table_writer.write(score_table(row))


def _report_cost(
    models: ModelPair, parent: Artifact, missing: list[Part], config: ScoreConfig, directory: Path, observer: Observer
) -> None:
    """Report bytes, tokens and expected time of the missing parts. Raises TsdkdError when the disk is too small."""
    workload = ScoreWorkload()
    for part in missing:
        workload += score_workload(parent.read_part(part, COLUMNS))
    cost = score_cost(config, models[1].head, workload.response_tokens)
    free = shutil.disk_usage(directory).free
    rate = world_size() * _tokens_per_second(models, parent.read_part(missing[0], COLUMNS), config)
    minutes = workload.tokens / rate / 60
    observer.table(
        "Cost of scoring",
        [
            *cost.rows(),
            ("free on disk", format_bytes(free)),
            ("tokens to read", f"{workload.tokens:,}"),
            ("expected time", f"{minutes:,.1f} min" + (f" in {world_size()} processes" if world_size() > 1 else "")),
        ],
    )
    if cost.bytes > free:
        raise TsdkdError(
            f"Scores need {format_bytes(cost.bytes)}, but {directory} has {format_bytes(free)} free.",
            "Free space, choose another --scores directory, or use --signal hidden8 or topk.",
        )


def _tokens_per_second(models: ModelPair, table: pa.Table, config: ScoreConfig) -> float:
    """The rate of one process on a small batch, after a warm-up of one sequence."""
    lengths, small = sequence_lengths(table), replace(config, batch_tokens=min(config.batch_tokens, PROBE_TOKENS))
    batches = list(score_batches(lengths, range(len(lengths)), small))
    longest, shortest = batches[0], batches[-1]
    seconds = 0.0
    for batch in (shortest[:1], longest):  # the first call warms up
        start = time.perf_counter()
        score_responses(table.take(batch).to_pylist(), models, config)
        seconds = time.perf_counter() - start
    return sum(lengths[i] for i in longest) / seconds
