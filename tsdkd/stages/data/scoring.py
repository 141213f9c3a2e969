"""What two models see in some responses: a forward pass each, then the vocabulary-sized work on chunks of tokens.

Memory holds the logits of one chunk; (batch, seq, vocab) never exists.
"""

from typing import Any

import torch
from torch import Tensor

from tsdkd.core import Head, TeacherHidden, TSDKDConfig
from tsdkd.core.distributions import divergence_of, entropy_of, log_probs
from tsdkd.core.ranking import propose
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.batches import join_right_padded
from tsdkd.stages.data.teacher_signals import LOSSY_SIGNALS, SIGNALS_WITH_HEAD, SignalDecoder, encode_signal
from tsdkd.stages.models.load import LanguageModel

CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**29}
"""Logits of one model formed at a time, in float32."""
LEAST_TOKENS = 64
"""A chunk's tokens, however little memory is free: with fewer, products only wait for the head's weights."""

RECORDED = TSDKDConfig().formula
"""The divergence that is recorded beside a lossy signal."""

Row = dict[str, Any]
Readers = tuple[LanguageModel, LanguageModel]
"""The student and the teacher."""


def score_responses(rows: list[Row], readers: Readers, config: ScoreConfig) -> list[Row]:
    """Rows of rollouts, read as one batch -> their rows of scores; columns are tensors (tokens, ...) on the CPU."""
    responses = [row["response_ids"] for row in rows]
    ids, attention, predicting = join_right_padded([row["prompt_ids"] for row in rows], responses)
    sampled = torch.tensor([token for response in responses for token in response])
    with torch.inference_mode():
        student, teacher = (_hidden(reader, ids, attention, predicting) for reader in readers)
        columns = _columns(student, teacher, sampled, readers, config)
    lengths = [len(response) for response in responses]
    split = {name: values.split(lengths) for name, values in columns.items()}
    return [
        {"sample_id": row["sample_id"]} | {name: values[i] for name, values in split.items()}
        for i, row in enumerate(rows)
    ]


def _hidden(reader: LanguageModel, ids: Tensor, attention: Tensor, predicting: Tensor) -> Tensor:
    """Hidden states (tokens, width) where a response token is predicted."""
    hidden = reader.hidden(ids.to(reader.device), attention.to(reader.device))
    return hidden[predicting.to(hidden.device)]


def _columns(student: Tensor, teacher: Tensor, sampled: Tensor, readers: Readers, config: ScoreConfig) -> Row:
    """Hidden states (tokens, width) of both, sampled ids (tokens,) -> the scores' columns (tokens, ...), on the CPU."""
    heads = readers[0].head, readers[1].head
    chunk = _chunk_tokens(heads[1])
    pieces = [
        {name: value.cpu() for name, value in _chunk(*tensors, heads, config).items()}
        for tensors in zip(student.split(chunk), teacher.split(chunk), sampled.split(chunk), strict=True)
    ]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _chunk(
    student: Tensor, teacher: Tensor, sampled: Tensor, heads: tuple[Head, Head], config: ScoreConfig
) -> dict[str, Tensor]:
    """`_columns` for as many tokens as memory is good for, on the teacher's device."""
    device = teacher.device
    log_q, log_p = log_probs(heads[0].logits(student)).to(device), log_probs(heads[1].logits(teacher))
    candidates = propose(log_q, config.k)
    liking = heads[1].logits_at(teacher, candidates)  # not from log_p: bf16 logits tie
    chosen = sampled.to(device).unsqueeze(-1)
    columns = {
        "student_entropy": entropy_of(log_q),
        "teacher_entropy": entropy_of(log_p),
        "student_log_prob": log_q.gather(-1, chosen).squeeze(-1),
        "teacher_log_prob": log_p.gather(-1, chosen).squeeze(-1),
        "candidates": candidates,
        "ranks": liking.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1),
    }
    columns |= encode_signal(teacher.to(heads[1].weight.dtype), log_p, config)  # hidden states as the head reads them
    if config.signal in LOSSY_SIGNALS:
        head = heads[1] if config.signal in SIGNALS_WITH_HEAD else None
        recorded = SignalDecoder(config.signal, config.k, config.top_k, head).decode(columns)
        known = recorded.formed() if isinstance(recorded, TeacherHidden) else recorded
        columns |= {
            "divergence": divergence_of(log_p, log_q, RECORDED),
            "recorded_divergence": known.divergence(log_q, RECORDED, 1.0),
        }
    return columns


def _chunk_tokens(head: Head) -> int:
    """On CPUs always the same, so that a run gives the same bytes twice; on a GPU no more than its memory is good for.

    Some eight tensors of a chunk's size are alive at once; half of the free memory is left alone.
    """
    vocab, device = len(head.cut.weight), head.weight.device
    if device.type == "cpu":
        return max(1, CHUNK_BYTES["cpu"] // (4 * vocab))
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    room = min(CHUNK_BYTES["cuda"], (torch.cuda.mem_get_info(device)[0] + cached) // 16)
    return max(LEAST_TOKENS, room // (4 * vocab))
