"""The interface of the trainer's sources: samples, the teacher's signal for a batch, and the student's at scoring."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tsdkd.core import Head, TeacherSignal
from tsdkd.core.distributions import log_probs
from tsdkd.core.ranking import propose
from tsdkd.stages.data.batches import Batch, join_sequences
from tsdkd.stages.data.turns import response_turns
from tsdkd.stages.metrics.step_times import timed
from tsdkd.stages.models.language_model import LanguageModel

Sample = dict[str, Any]
"""One rollout: "sample_id", "prompt_id", "prompt_ids", "author", "response_ids", "response_mask" (None: all tokens are
one turn; may be absent), "finish_reason", and the columns that a source adds."""

COMPARED_TOKENS = 64
"""Evenly spaced tokens of a batch that a snapshot is compared on; more would cost time in every step."""


class RecordedColumns(Protocol):
    """What recorded scores hold for samples."""

    def recorded(self, samples: list[Sample]) -> dict[str, Tensor]:
        """The scores' columns as tensors (tokens, ...), read from disk; empty without scores."""


class Source(RecordedColumns, Protocol):
    """Samples by index, and the teacher's signal for them."""

    teacher_fraction: float
    """The teacher's weight in the mixture that each response token was sampled from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def length(self, index: int) -> int:
        """Tokens of a prompt with its response."""

    def prompt_id(self, index: int) -> str:
        """The id that all samples of one prompt share."""

    def with_responses(
        self, samples: list[Sample], student: LanguageModel, key: Sequence[int], progress: float = 0.0
    ) -> list[Sample]:
        """The samples of one optimizer step with the responses to train on.

        `key` decides all random draws, so that a resumed step samples the same responses. `progress`: the fraction of
        all optimizer steps that are done.
        """

    def read_ahead(self, samples: list[Sample]) -> list[Sample]:
        """The samples of one optimizer step and rank, with responses, and with what `recorded` needs of teachers that
        read them before the step."""

    def signal(self, batch: Batch) -> TeacherSignal:
        """The teacher's signal for the batch's response tokens."""

    def scoring_snapshot(self, batch: Batch) -> "ScoringSnapshot | SamplingSnapshot | None":
        """The student's log-probabilities at scoring, with candidates, or at sampling; None where they are unknown."""


@dataclass(frozen=True, slots=True)
class ScoringSnapshot:
    """The student's predictions of response tokens at scoring; the current student's drift is measured from them."""

    response_ids: Tensor
    """(tokens,)"""
    log_probs: Tensor
    """Of the response ids (tokens,)."""
    candidates: Tensor
    """(tokens, k)"""

    @torch.no_grad()
    def compare(self, hidden: Tensor, head: Head) -> dict[str, Tensor]:
        """Compares the snapshot with the current student, given its hidden states (tokens, width) and head.

        "candidate_overlap": the fraction of the k candidates that the current student also proposes. "drift": the mean
        decrease of the response tokens' log-probabilities in nats; it estimates KL(student at scoring || current
        student) if the student at scoring sampled the responses at temperature 1.
        """
        count = min(COMPARED_TOKENS, len(hidden))
        rows = torch.linspace(0, len(hidden) - 1, count, device=hidden.device).long()
        log_q = log_probs(head.logits(hidden[rows]))
        before, now = self.candidates[rows], propose(log_q, self.candidates.shape[-1])
        proposed_again = (before.unsqueeze(-1) == now.unsqueeze(-2)).any(-1)
        drift = self.log_probs[rows] - log_q.gather(-1, self.response_ids[rows].unsqueeze(-1)).squeeze(-1)
        return {"candidate_overlap": proposed_again.float().mean(), "drift": drift.mean()}


@dataclass(frozen=True, slots=True)
class SamplingSnapshot:
    """The log-probabilities with which some of a batch's tokens were sampled; the drift is measured from them."""

    rows: Tensor
    """The numbers of these tokens among the batch's response tokens (compared,)."""
    ids: Tensor
    log_probs: Tensor
    """At `temperature`."""
    temperature: float

    @torch.no_grad()
    def compare(self, hidden: Tensor, head: Head) -> dict[str, Tensor]:
        """The "drift" of `ScoringSnapshot.compare`, given the current student's hidden states (tokens, width)."""
        log_q = log_probs(head.logits(hidden[self.rows]), self.temperature)
        return {"drift": (self.log_probs - log_q.gather(-1, self.ids.unsqueeze(-1)).squeeze(-1)).mean()}


def collate(samples: list[Sample], source: RecordedColumns, *, packed: bool = False) -> Batch:
    """At least one sample -> a batch, padded or packed."""
    with timed("teacher"):
        recorded = source.recorded(samples)
    return join_samples(samples, packed=packed) | {"recorded": recorded}


def join_samples(samples: list[Sample], *, packed: bool) -> Batch:
    """At least one sample -> the tensors of `join_sequences`."""
    prompts, responses = ([sample[name] for sample in samples] for name in ("prompt_ids", "response_ids"))
    return join_sequences(prompts, responses, list(map(sample_turns, samples)), packed=packed)


def sample_length(sample: Sample) -> int:
    """Tokens of a prompt with its response."""
    return len(sample["prompt_ids"]) + len(sample["response_ids"])


def sample_turns(sample: Sample) -> list[range]:
    """The positions of the turns of a sample's response."""
    return response_turns(len(sample["response_ids"]), sample.get("response_mask"))


def turns_of_samples(samples: list[Sample]) -> list[Sample]:
    """The turns of all samples, as `turns_as_samples`."""
    return [turn for sample in samples for turn in turns_as_samples(sample)]


def turns_as_samples(sample: Sample) -> list[Sample]:
    """Each turn of a sample's response as a response of its own; only the last one can be truncated."""
    turns = sample_turns(sample)
    reasons = [*["stop"] * (len(turns) - 1), sample["finish_reason"]]
    return [
        {
            "sample_id": sample["sample_id"],
            "prompt_id": sample["prompt_id"],
            "author": sample["author"],
            "turn": i,
            "response_ids": sample["response_ids"][turn.start : turn.stop],
            "finish_reason": reason,
        }
        for i, (turn, reason) in enumerate(zip(turns, reasons, strict=True))
    ]


def empty_batch(*, packed: bool = False) -> Batch:
    """A batch without samples, for a rank that has none left but must take part in the step."""
    ones = torch.ones(1, 1, dtype=torch.long)
    inputs = {"input_ids": 0 * ones, "attention_mask": None if packed else ones, "position_ids": 0 * ones}
    return inputs | {"predicting": ~ones.bool(), "response_mask": ones[:0].bool(), "recorded": {}}
