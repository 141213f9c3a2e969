"""Scores of responses: one forward pass of student and teacher, then their logits on chunks of tokens.

Memory holds the logits of one chunk, never (batch, seq, vocab).
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tsdkd.core import Head, TSDKDConfig
from tsdkd.core.distributions import divergence_of, entropy_of, log_probs
from tsdkd.core.ranking import propose
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.batches import Batch, join_sequences, predicted_ids, predicting_hidden
from tsdkd.stages.data.hidden_reader import HiddenReader
from tsdkd.stages.data.signal_storage import LOSSY_SIGNALS, SIGNALS_WITH_HEAD, SignalDecoder, encode_signal
from tsdkd.stages.data.source import sample_turns
from tsdkd.stages.models.language_model import LanguageModel, not_finite_error
from tsdkd.stages.observer import Observer

CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**29}
"""Bytes of one model's logits in float32 that are formed at a time."""
MIN_CHUNK_TOKENS = 64
"""The smallest chunk on a GPU: smaller matrix products are bound by reading the head's weights."""

RECORDED_DIVERGENCE = TSDKDConfig().formula
"""The divergence that scores with a lossy signal record."""

RolloutRow = dict[str, Any]
ScoreRow = dict[str, Any]
ModelPair = tuple[LanguageModel, LanguageModel] | tuple[HiddenReader, HiddenReader]
"""Student and teacher."""
CompareChunk = Callable[[Tensor, Tensor, Tensor, tuple[Head, Head]], dict[str, Tensor]]
"""Hidden states of student and teacher (tokens, width), sampled ids (tokens,), both heads -> columns (tokens, ...)."""


def report_padded_reading(models: Iterable[LanguageModel], observer: Observer) -> None:
    """Name the models that read padded batches, because they cannot read packed ones."""
    for model in models:
        if model.packing_problem:
            observer.info(f"{model.name} reads padded batches: it {model.packing_problem}.")


def score_responses(rollouts: list[RolloutRow], models: ModelPair, config: ScoreConfig) -> list[ScoreRow]:
    """Rows of rollouts, read as one batch -> their rows of scores; columns are tensors (tokens, ...) on the CPU.

    Raises NotFiniteError for a model whose entropies are not finite.
    """
    return compare_responses(rollouts, models, partial(_score_chunk, config=config))


def score_in_turn(
    batches: Iterable[list[RolloutRow]], models: ModelPair, config: ScoreConfig
) -> Iterator[list[ScoreRow]]:
    """As `score_responses` for each batch. Readers read the next batch while the previous one is compared."""
    return _compare_in_turn(batches, models, partial(_score_chunk, config=config))


def compare_responses(rollouts: list[RolloutRow], models: ModelPair, compare_chunk: CompareChunk) -> list[ScoreRow]:
    """As `score_responses`, with the columns that `compare_chunk` returns, among them both entropies."""
    return next(_compare_in_turn([rollouts], models, compare_chunk))


def _compare_in_turn(
    batches: Iterable[list[RolloutRow]], models: ModelPair, compare_chunk: CompareChunk
) -> Iterator[list[ScoreRow]]:
    remaining = iter(batches)
    following = _start(models, remaining)
    while rollouts := following:
        batch, hidden = _read(models, rollouts)
        following = _start(models, remaining)
        rows = _compare(rollouts, batch, hidden, models, compare_chunk)
        del hidden  # frees the memory for the next batch
        yield rows


def _start(models: ModelPair, batches: Iterator[list[RolloutRow]]) -> list[RolloutRow] | None:
    """Take the next batch, which readers begin to read; None after the last one."""
    rollouts = next(batches, None)
    for model in models:
        if rollouts and isinstance(model, HiddenReader):
            model.start([[*row["prompt_ids"], *row["response_ids"]] for row in rollouts])
    return rollouts


def _read(models: ModelPair, rollouts: list[RolloutRow]) -> tuple[Batch, tuple[Tensor, Tensor]]:
    """Rows of rollouts as one batch, and both models' hidden states (tokens, width) of its predicting positions."""
    prompts, responses = ([row[name] for row in rollouts] for name in ("prompt_ids", "response_ids"))
    batch = join_sequences(prompts, responses, list(map(sample_turns, rollouts)), packed=True)
    with torch.inference_mode():
        student, teacher = (
            _finish(model, rollouts) if isinstance(model, HiddenReader) else predicting_hidden(model, batch)
            for model in models
        )
    return batch, (student, teacher)


def _finish(reader: HiddenReader, rollouts: list[RolloutRow]) -> Tensor:
    """As `predicting_hidden`."""
    predicting = [
        states[[len(row["prompt_ids"]) - 1 + i for turn in turns for i in turn]]
        for states, row, turns in zip(reader.finish(), rollouts, map(sample_turns, rollouts), strict=True)
    ]
    return torch.cat(predicting).to(reader.head.weight.device)


def _compare(
    rollouts: list[RolloutRow],
    batch: Batch,
    hidden: tuple[Tensor, Tensor],
    models: ModelPair,
    compare_chunk: CompareChunk,
) -> list[ScoreRow]:
    with torch.inference_mode():
        columns = _compare_chunks(*hidden, predicted_ids(batch), models, compare_chunk)
    for name, model in (("student_entropy", models[0]), ("teacher_entropy", models[1])):
        if not columns[name].isfinite().all():
            raise not_finite_error(model.name, model.head.weight.dtype)
    lengths = [sum(map(len, ranges)) for ranges in map(sample_turns, rollouts)]
    by_response = {name: values.split(lengths) for name, values in columns.items()}
    return [
        {"sample_id": row["sample_id"]} | {name: values[i] for name, values in by_response.items()}
        for i, row in enumerate(rollouts)
    ]


def _compare_chunks(
    student: Tensor, teacher: Tensor, sampled: Tensor, models: ModelPair, compare_chunk: CompareChunk
) -> dict[str, Tensor]:
    """Both models' hidden states (tokens, width), sampled ids (tokens,) -> columns (tokens, ...) on the CPU."""
    heads = models[0].head.aligned, models[1].head.aligned
    chunk = chunk_tokens(heads[1])
    pieces = [
        {name: value.cpu() for name, value in compare_chunk(*tensors, heads).items()}
        for tensors in zip(student.split(chunk), teacher.split(chunk), sampled.split(chunk), strict=True)
    ]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _score_chunk(
    student: Tensor, teacher: Tensor, sampled: Tensor, heads: tuple[Head, Head], config: ScoreConfig
) -> dict[str, Tensor]:
    """The columns of one chunk, on the teacher's device."""
    device = teacher.device
    log_q, log_p = log_probs(heads[0].logits(student)).to(device), log_probs(heads[1].logits(teacher))
    candidates = propose(log_q, config.k)
    teacher_logits = heads[1].logits_at(teacher, candidates)  # in float32; bfloat16 log-probabilities have ties
    ids = sampled.to(device).unsqueeze(-1)
    columns = {
        "student_entropy": entropy_of(log_q),
        "teacher_entropy": entropy_of(log_p),
        "student_log_prob": log_q.gather(-1, ids).squeeze(-1),
        "teacher_log_prob": log_p.gather(-1, ids).squeeze(-1),
        "candidates": candidates,
        "ranks": teacher_logits.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1),
    }
    columns |= encode_signal(teacher.to(heads[1].weight.dtype), log_p, config)  # in the precision of the head's input
    if config.signal in LOSSY_SIGNALS:
        decoded = {"": heads[1]} if config.signal in SIGNALS_WITH_HEAD else {}
        recorded = SignalDecoder(config.signal, config.k, config.top_k, decoded).decode(columns)
        columns |= {
            "divergence": divergence_of(log_p, log_q, RECORDED_DIVERGENCE),
            "signal_divergence": recorded.divergence(log_q, RECORDED_DIVERGENCE, 1.0),
        }
    return columns


def chunk_tokens(head: Head) -> int:
    """Tokens whose logits are formed at a time; on a GPU limited by its free memory.

    On CPUs it is a constant, so that every run writes the same bytes. A chunk needs about eight tensors of its size;
    the limit leaves half of the free memory unused.
    """
    vocab, device = head.vocab, head.weight.device
    if device.type == "cpu":
        return max(1, CHUNK_BYTES["cpu"] // (4 * vocab))
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    chunk_bytes = min(CHUNK_BYTES["cuda"], (torch.cuda.mem_get_info(device)[0] + cached) // 16)
    return max(MIN_CHUNK_TOKENS, chunk_bytes // (4 * vocab))
