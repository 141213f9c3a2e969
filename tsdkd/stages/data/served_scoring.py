"""Scores of responses with a served teacher: the student is read here, the teacher by its server."""

from typing import Any

import torch
from torch import Tensor

from tsdkd.core.distributions import entropy_of, log_probs
from tsdkd.core.entropy_bounds import entropy_bounds, estimated_entropy
from tsdkd.core.ranking import propose
from tsdkd.errors import TsdkdError
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.batches import join_sequences, predicted_ids, predicting_hidden
from tsdkd.stages.data.scoring import RolloutRow, ScoreRow, chunk_tokens
from tsdkd.stages.data.turns import response_turns
from tsdkd.stages.models.language_model import LanguageModel, not_finite_error
from tsdkd.stages.teacher_server.reading import Reading, ReadRequest, teacher_ranks

MIN_CAPTURED_MASS = 0.7
"""Least mean probability of the K tokens. With less, the estimate of the entropy is off by more than a tenth of it."""
SERVED_COLUMNS = ("teacher_entropy_low", "teacher_entropy_high", "tied_candidates")
"""The optional columns of scores with a served teacher."""


def student_scores(rollouts: list[RolloutRow], student: LanguageModel, k: int) -> list[ScoreRow]:
    """The student's columns of rows of rollouts, read as one batch; tensors (tokens, ...) on the CPU.

    Raises NotFiniteError for a student whose entropies are not finite.
    """
    turns = [_turns(row) for row in rollouts]
    prompts, responses = ([row[name] for row in rollouts] for name in ("prompt_ids", "response_ids"))
    batch = join_sequences(prompts, responses, turns, packed=True)
    with torch.inference_mode():
        hidden, ids = predicting_hidden(student, batch), predicted_ids(batch)
        chunk = chunk_tokens(student.head)
        pieces = [
            _student_chunk(student, *tensors, k) for tensors in zip(hidden.split(chunk), ids.split(chunk), strict=True)
        ]
    columns = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    if not columns["student_entropy"].isfinite().all():
        raise not_finite_error(student.name, student.head.weight.dtype)
    lengths = [sum(map(len, ranges)) for ranges in turns]
    split = {name: values.split(lengths) for name, values in columns.items()}
    return [
        {"sample_id": row["sample_id"]} | {name: values[i] for name, values in split.items()}
        for i, row in enumerate(rollouts)
    ]


def _student_chunk(student: LanguageModel, hidden: Tensor, ids: Tensor, k: int) -> dict[str, Tensor]:
    log_q = log_probs(student.head.logits(hidden))
    own = log_q.gather(-1, ids.to(log_q.device).unsqueeze(-1)).squeeze(-1)
    columns = {"student_entropy": entropy_of(log_q), "student_log_prob": own, "candidates": propose(log_q, k)}
    return {name: values.cpu() for name, values in columns.items()}


def read_request(row: dict[str, Any], candidates: Tensor | None = None) -> ReadRequest:
    """The request for the teacher's predictions of a row's response. `candidates`: the student's (tokens, k)."""
    start = len(row["prompt_ids"])
    positions = [start + i for turn in _turns(row) for i in turn]
    return ReadRequest(
        [*row["prompt_ids"], *row["response_ids"]], positions, [] if candidates is None else candidates.tolist()
    )


def teacher_columns(reading: Reading, vocab: int, config: ScoreConfig) -> dict[str, Tensor]:
    """The teacher's columns of scores, as tensors (tokens, ...). `vocab`: ids that the student knows."""
    least, greatest = entropy_bounds(reading.top_log_probs, vocab)
    columns = {
        "teacher_entropy": estimated_entropy(least, greatest),
        "teacher_entropy_low": least,
        "teacher_entropy_high": greatest,
        "teacher_log_prob": reading.token_log_probs,
        "ranks": teacher_ranks(reading.candidate_log_probs),
        "tied_candidates": reading.candidate_log_probs.isnan().sum(-1),
    }
    if config.signal == "topk":
        columns |= {"top_ids": reading.top_ids, "top_log_probs": reading.top_log_probs}
    return columns


def require_captured_mass(readings: list[Reading], top_k: int, option: str = "--top-k", teacher: str = "") -> None:
    """Raises TsdkdError where the K tokens hold too little of the teacher's probability.

    `option`: it sets K; `teacher`: its name, "" for an only one.
    """
    mass = float(torch.cat([reading.top_log_probs for reading in readings]).exp().sum(-1).mean())
    if mass < MIN_CAPTURED_MASS:
        raise TsdkdError(
            too_little_mass(mass, top_k, teacher),
            f"Start vLLM with a larger --max-logprobs and give a larger {option}.",
        )


def too_little_mass(mass: float, top_k: int, teacher: str = "") -> str:
    """The message for a captured mass below `MIN_CAPTURED_MASS`. `teacher`: its name; "" for an only one."""
    owner = f"the teacher {teacher}" if teacher else "the teacher"
    return (
        f"The {top_k} most likely tokens of {owner} hold only {mass:.2f} of its probability; "
        f"{MIN_CAPTURED_MASS} is the least from which its entropy can be estimated."
    )


def _turns(row: dict[str, Any]) -> list[range]:
    return response_turns(len(row["response_ids"]), row.get("response_mask"))
