"""score: rollouts -> scores. Both models read every response once; what TSD-KD asks of them is written down.

The vocabulary-sized work is done on chunks of response positions; (batch, seq, vocab) never exists.
"""

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tsdkd.artifacts import SCHEMAS, Artifact, Manifest, Writer, read
from tsdkd.core.distributions import entropy_of, log_probs
from tsdkd.core.ranking import propose
from tsdkd.errors import InputError, TsdkdError
from tsdkd.stages.batches import by_length, join
from tsdkd.stages.config import ScoreConfig
from tsdkd.stages.models import (
    LanguageModel,
    describe,
    libraries,
    load_model,
    load_tokenizer,
    require_same_tokenizer,
    vocab_size,
)
from tsdkd.stages.report import Reporter, Silent
from tsdkd.stages.signals import HEAD_FILE, bytes_per_token, save_head, to_bytes

CHUNK_LOGITS = 2**25
"""Logits formed at a time: 128 MiB in float32."""

Row = dict[str, Any]


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
    parent = read(rollouts, "rollouts")
    models = describe("student", student), describe("teacher", teacher)
    require_same_tokenizer(*models)
    _require_candidates(config, vocab_size(load_tokenizer(student)))
    for author in parent.manifest.models:
        require_same_tokenizer(author, models[0])
        reader = next(model for model in models if model.role == author.role)
        if author.weights != reader.weights:
            reporter.say(f"The rollouts come from another {author.role} ({author.name}) than the one that reads them.")
    manifest = Manifest(
        kind="scores",
        config=asdict(config),
        seed=parent.manifest.seed,
        parents=(parent.as_parent_of(output),),
        models=models,
        libraries=libraries(),
    )
    with Writer.open(output, manifest, overwrite=overwrite) as writer:
        if writer.complete:
            reporter.say(f"{output} is complete: nothing to do.")
            return writer.artifact
        todo = [part for part in parent.tables if not writer.has(part.file)]
        if not todo:
            return writer.finish(_summary(writer.artifact))
        readers = load_model(student, config.dtype), load_model(teacher, config.dtype)
        _state_cost(readers, [parent.read_part(part) for part in todo], config, output, reporter)
        if config.signal == "hidden" and not writer.has(HEAD_FILE):
            save_head(readers[1].head, writer.aside(HEAD_FILE))
            writer.add_file(HEAD_FILE)
        done = parent.manifest.rows - sum(part.rows or 0 for part in todo)
        with reporter.progress("both models read", parent.manifest.rows, "responses", done) as advance:
            for part in todo:
                table = parent.read_part(part)
                rows: dict[int, Row] = {}
                for batch in by_length(_lengths(table), tokens=config.batch_tokens):
                    rows.update(zip(batch, _read(table, batch, readers, config), strict=True))
                    advance(len(batch))
                ordered = [rows[i] for i in range(len(table))]
                # One response per row group: training reads single rows in random order.
                writer.write_table(part.file, pa.Table.from_pylist(ordered, SCHEMAS["scores"]), row_group_size=1)
        return writer.finish(_summary(writer.artifact))


def _require_candidates(config: ScoreConfig, vocab: int) -> None:
    for option, value in (("--k", config.k), ("--top-k", config.top_k if config.signal == "topk" else 0)):
        if value >= vocab:
            raise InputError(
                f"{option} is {value}, but the vocabulary has only {vocab} tokens.", f"Choose a smaller {option}."
            )


def _lengths(table: pa.Table) -> list[int]:
    counted = pc.add(pc.list_value_length(table["prompt_ids"]), pc.list_value_length(table["response_ids"]))
    return list(counted.to_pylist())


def _read(
    table: pa.Table, batch: list[int], readers: tuple[LanguageModel, LanguageModel], config: ScoreConfig
) -> list[Row]:
    rows = table.take(batch).to_pylist()
    responses = [row["response_ids"] for row in rows]
    ids, attention, predicting = join([row["prompt_ids"] for row in rows], responses)
    with torch.inference_mode():
        student, teacher = (
            reader.hidden(ids.to(reader.device), attention.to(reader.device))[predicting.to(reader.device)]
            for reader in readers
        )
        columns = _columns(student, teacher, torch.tensor([t for r in responses for t in r]), readers, config)
    lengths = [len(response) for response in responses]
    split = {name: values.split(lengths) for name, values in columns.items()}
    return [
        {"sample_id": row["sample_id"]}
        | {name: to_bytes(v[i]) if name == "hidden" else v[i].flatten().numpy() for name, v in split.items()}
        for i, row in enumerate(rows)
    ]


def _columns(
    student: Tensor, teacher: Tensor, sampled: Tensor, readers: tuple[LanguageModel, LanguageModel], config: ScoreConfig
) -> dict[str, Tensor]:
    """Hidden states (tokens, width) of both, sampled ids (tokens,) -> the scores' columns (tokens, ...), on the CPU."""
    heads = readers[0].head, readers[1].head
    chunk = max(1, CHUNK_LOGITS // (heads[0].vocab_size or 1))
    pieces: list[dict[str, Tensor]] = []
    for s, t, token in zip(student.split(chunk), teacher.split(chunk), sampled.split(chunk), strict=True):
        log_q, log_p = log_probs(heads[0].logits(s)), log_probs(heads[1].logits(t).to(s.device))
        candidates = propose(log_q, config.k)
        liking = heads[1].logits_at(t, candidates.to(t.device))  # not from log_p: bf16 logits tie
        chosen = token.to(s.device).unsqueeze(-1)
        piece = {
            "student_entropy": entropy_of(log_q),
            "teacher_entropy": entropy_of(log_p),
            "student_logprob": log_q.gather(-1, chosen).squeeze(-1),
            "teacher_logprob": log_p.gather(-1, chosen).squeeze(-1),
            "candidates": candidates,
            "ranks": liking.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1),
        }
        if config.signal == "hidden":
            piece["hidden"] = t.to(heads[1].weight.dtype)  # as the head reads it
        if config.signal == "topk":
            top = log_p.topk(config.top_k, dim=-1)
            piece |= {"top_ids": top.indices, "top_logprobs": top.values}
        pieces.append({name: value.cpu() for name, value in piece.items()})
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _state_cost(
    readers: tuple[LanguageModel, LanguageModel],
    tables: list[pa.Table],
    config: ScoreConfig,
    output: Path,
    reporter: Reporter,
) -> None:
    """Tell bytes per token, total and expected time; raise TsdkdError when the disk is too small."""
    vocab = readers[0].head.vocab_size or 0
    head = readers[1].head.weight
    per_token = bytes_per_token(config, head.shape[1], head.dtype)
    tokens = sum(pc.sum(pc.list_value_length(table["response_ids"])).as_py() for table in tables)
    fixed = vocab * head.shape[1] * head.dtype.itemsize if config.signal == "hidden" else 0
    total = tokens * per_token + fixed
    free = shutil.disk_usage(output).free
    reporter.table(
        "What scoring will cost",
        [
            ("response tokens", f"{tokens:,}"),
            (f"bytes per token ({config.signal})", f"{per_token:,}"),
            ("total on disk", f"{total / 1e9:.2f} GB of {free / 1e9:.0f} GB free"),
            ("expected time", f"{_expected_seconds(readers, tables, config) / 60:.1f} min"),
        ],
    )
    if total > free:
        raise TsdkdError(
            f"Scores need {total / 1e9:.1f} GB, but {output} has {free / 1e9:.1f} GB free.",
            "Free space, choose another --scores directory, or use --signal topk.",
        )


def _expected_seconds(
    readers: tuple[LanguageModel, LanguageModel], tables: list[pa.Table], config: ScoreConfig
) -> float:
    """From timing one small batch of the first part."""
    lengths = _lengths(tables[0])
    probe = next(by_length(lengths, tokens=min(config.batch_tokens, 2048)))
    start = time.perf_counter()
    _read(tables[0], probe, readers, config)
    rate = sum(lengths[i] for i in probe) / (time.perf_counter() - start)
    return sum(sum(_lengths(table)) for table in tables) / rate


def _summary(artifact: Artifact) -> dict[str, float]:
    """Means over response tokens, of what was written."""
    columns = ["student_entropy", "teacher_entropy", "student_logprob", "teacher_logprob", "top_logprobs"]
    table = pa.concat_tables(pq.read_table(artifact.path / part.file, columns=columns) for part in artifact.tables)
    flat = {name: table[name].combine_chunks().flatten().to_numpy() for name in columns}
    tokens = len(flat["student_entropy"])
    summary = {name: float(flat[name].mean()) for name in columns[:4]}
    if len(flat["top_logprobs"]):
        summary["captured_mass"] = float(np.exp(flat["top_logprobs"]).sum() / tokens)
    return {"tokens": tokens, **summary}
