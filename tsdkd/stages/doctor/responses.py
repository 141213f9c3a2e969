"""Responses of both models to the sampled prompts, and both models' distributions at every token of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tsdkd.core import AdaptiveOpener, Divergence, Head, TSDKDConfig, select
from tsdkd.core.distributions import divergence_of, entropy_of, log_probs
from tsdkd.core.ranking import outside_mass, propose
from tsdkd.stages.config.doctor import DoctorConfig
from tsdkd.stages.data.batches import batches_by_length
from tsdkd.stages.data.randomness import random_integer
from tsdkd.stages.data.requests import Request, RequestBatch, Response
from tsdkd.stages.data.scoring import ScoreRow, compare_responses
from tsdkd.stages.data.thoughts import THOUGHT_START
from tsdkd.stages.doctor.chat_prompts import SampledPrompts
from tsdkd.stages.engines.transformers_engine import TransformersEngine
from tsdkd.stages.metrics.health import is_repeating
from tsdkd.stages.models.chat import pair_end_ids
from tsdkd.stages.models.language_model import LanguageModel, share_vocab
from tsdkd.stages.models.load import load_model
from tsdkd.stages.observer import Observer

BATCH_TOKENS = 8192
"""Tokens per forward pass, padding included."""


@dataclass(frozen=True)
class Responses:
    """The responses of one model, one to each sampled prompt, as measured."""

    columns: dict[str, Tensor]
    """Mean over the tokens of each response, (responses,), by the name of the value."""
    lengths: list[int]
    truncated: float
    """The fraction of responses that their limit cut."""
    repeating: float
    """The fraction of responses that repeat themselves."""
    thinking: float
    """The fraction of responses that begin with a thought."""
    limit: int
    """The longest response that was sampled, in tokens."""

    def mean(self, name: str) -> float:
        """The mean over responses."""
        return float(self.columns[name].mean())

    def means(self) -> dict[str, float]:
        """Every value by name."""
        length = sum(self.lengths) / len(self.lengths)
        fractions = {"truncated": self.truncated, "repeating": self.repeating, "thinking": self.thinking}
        return {name: self.mean(name) for name in self.columns} | {"response_length": length} | fractions


def sample_both(
    names: Sequence[str], sampled: SampledPrompts, config: DoctorConfig, seed: int, observer: Observer
) -> tuple[Responses, Responses]:
    """The student's and the teacher's responses. `names`: student and teacher.

    Raises InputError for a model that cannot be loaded, TsdkdError for one whose values are not finite.
    """
    sampling = config.sampling
    student, teacher = (
        load_model(name, sampling.dtype, attention=sampling.attention, observer=observer) for name in names
    )
    ends = pair_end_ids(student.tokenizer, student.end_ids, teacher.end_ids)
    models = share_vocab(replace(student, pair_end_ids=ends), replace(teacher, pair_end_ids=ends))
    limit = config.response_limit(models[0].device.type)
    roles = ("student", "teacher")
    written = [
        _sample(model, role, sampled, config, limit, seed, observer) for model, role in zip(models, roles, strict=True)
    ]
    with observer.progress("student and teacher read the responses", 2 * len(sampled.ids), "responses") as advance:
        by_role = []
        for responses in written:
            rows: dict[int, ScoreRow] = {}
            lengths = [len(p) + len(r.ids) for p, r in zip(sampled.ids, responses, strict=True)]
            for batch in batches_by_length(lengths, tokens=BATCH_TOKENS):
                read = [{"sample_id": i, "prompt_ids": sampled.ids[i], "response_ids": responses[i].ids} for i in batch]
                compare = partial(compare_chunk, k=config.objective.k)
                rows.update(zip(batch, compare_responses(read, models, compare), strict=True))
                advance(len(batch))
            by_role.append([rows[i] for i in range(len(responses))])
    student_responses, teacher_responses = (
        _measure(rows, responses, model, limit, config.objective)
        for rows, responses, model in zip(by_role, written, models, strict=True)
    )
    return student_responses, teacher_responses


def _sample(
    model: LanguageModel,
    role: str,
    sampled: SampledPrompts,
    config: DoctorConfig,
    limit: int,
    seed: int,
    observer: Observer,
) -> list[Response]:
    requests = [
        Request(prompt.prompt_id, ids, random_integer(seed, role, prompt.prompt_id))
        for prompt, ids in zip(sampled.prompts, sampled.ids, strict=True)
    ]
    engine = TransformersEngine(model, replace(config.sampling, max_new_tokens=limit))
    with observer.progress(f"{role} responds", len(requests), "responses") as advance:
        [(_, responses)] = engine.sample(iter([RequestBatch(requests)]), advance)
    return responses


def compare_chunk(
    student: Tensor, teacher: Tensor, sampled: Tensor, heads: tuple[Head, Head], k: int
) -> dict[str, Tensor]:
    """Both models at some tokens, as a `CompareChunk`; "candidate" means the student's k candidates.

    "kl": KL(teacher || student) in nats. "topk_agreement": the fraction of the candidates among the teacher's k most
    likely tokens. "top1_in_candidates": whether the teacher's most likely token is a candidate.
    """
    device = teacher.device
    log_q, log_p = log_probs(heads[0].logits(student)).to(device), log_probs(heads[1].logits(teacher))
    ids, candidates, best = sampled.to(device).unsqueeze(-1), propose(log_q, k), log_p.topk(k).indices
    shared = (candidates.unsqueeze(-1) == best.unsqueeze(-2)).any(-1)
    return {
        "student_entropy": entropy_of(log_q),
        "teacher_entropy": entropy_of(log_p),
        "student_log_prob": log_q.gather(-1, ids).squeeze(-1),
        "teacher_log_prob": log_p.gather(-1, ids).squeeze(-1),
        "student_outside_mass": outside_mass(log_q.gather(-1, candidates)),
        "teacher_outside_mass": outside_mass(log_p.gather(-1, candidates)),
        "topk_agreement": shared.float().mean(-1),
        "top1_in_candidates": (candidates == best[:, :1]).any(-1).float(),
        "top1_agreement": (candidates[:, 0] == best[:, 0]).float(),
        "kl": divergence_of(log_p, log_q, Divergence.jsd(0)),
    }


def _measure(
    rows: list[ScoreRow], responses: list[Response], model: LanguageModel, limit: int, objective: TSDKDConfig
) -> Responses:
    values = [{name: value for name, value in row.items() if isinstance(value, Tensor)} for row in rows]
    columns = {name: torch.stack([row[name].double().mean() for row in values]) for name in values[0]}
    student, teacher = (
        pad_sequence([row[f"{role}_entropy"] for row in values], True) for role in ("student", "teacher")
    )
    mask = pad_sequence([torch.ones(len(response.ids), dtype=torch.bool) for response in responses], True)
    fraction = AdaptiveOpener().fraction if objective.opener == "adaptive" else None
    weights = select(student, teacher, mask, objective, fraction)
    columns |= {
        "gate": weights.gate.where(mask, 0).sum(-1) / mask.sum(-1),
        "opener_length": (weights.indirect > 0).sum(-1).double(),
    }
    count = len(responses)
    texts: list[Any] = [model.tokenizer.decode(response.ids) for response in responses]
    return Responses(
        columns,
        [len(response.ids) for response in responses],
        truncated=sum(response.finish_reason == "length" for response in responses) / count,
        repeating=sum(is_repeating(response.ids) for response in responses) / count,
        thinking=sum(THOUGHT_START.match(text) is not None for text in texts) / count,
        limit=limit,
    )
