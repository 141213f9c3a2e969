"""Where training gets its responses and the teacher's view of them: recorded (`staged`) or made on the way (`live`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from tsdkd.core import Head, TeacherHidden, TeacherSignal
from tsdkd.core.distributions import log_probs
from tsdkd.core.ranking import propose
from tsdkd.stages.data.batches import align_responses
from tsdkd.stages.models.load import LanguageModel

Sample = dict[str, Any]
"""One response: "sample_id", "prompt_ids", "response_ids", "finish_reason", and what the source adds."""
Batch = dict[str, Any]
"""Samples as tensors: "input_ids", "attention_mask" (batch, seq), "response_mask" (batch, response), "recorded"."""


class Source(Protocol):
    """Samples by index, and what a teacher says of them."""

    teacher_fraction: float
    """Of the distribution that responses were sampled from, token by token; the rest is the student's."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def length(self, index: int) -> int:
        """Tokens of prompt and response."""

    def prompt_id(self, index: int) -> str:
        """What tells the prompts of samples apart."""

    def with_responses(
        self, samples: list[Sample], student: LanguageModel, key: Sequence[int], progress: float = 0.0
    ) -> list[Sample]:
        """As many samples, with responses; `key` decides what is sampled, so that a resumed step samples the same.

        `progress`: the share of all optimizer steps that is behind.
        """

    def recorded(self, samples: list[Sample]) -> dict[str, Tensor]:
        """The teacher's view as far as it is stored."""

    def signal(self, batch: Batch) -> TeacherSignal | TeacherHidden:
        """The teacher's view of a batch's response tokens."""

    def scoring_snapshot(self, batch: Batch) -> "ScoringSnapshot | None":
        """What the student said of them when they were scored, if they were."""


@dataclass(frozen=True, slots=True)
class ScoringSnapshot:
    """The student's view of response tokens (tokens,) at the time of scoring; shows how stale rollouts have become."""

    SPARSE: ClassVar[int] = 64
    """Tokens of a batch that are compared, evenly spread: an estimate that costs next to nothing."""

    sampled: Tensor
    """The responses' ids."""
    log_probs: Tensor
    """Of these ids."""
    candidates: Tensor
    """(tokens, k)"""

    @torch.no_grad()
    def compare(self, hidden: Tensor, head: Head) -> dict[str, Tensor]:
        """With the student's hidden states (tokens, width) as they are now.

        "candidate_overlap": the share of its k candidates that it would still propose. "drift": by how many nats the
        log-probability of its tokens fell; where it sampled them at temperature 1 this estimates KL(then || now).
        """
        rows = torch.linspace(0, len(hidden) - 1, min(self.SPARSE, len(hidden)), device=hidden.device).long()
        log_q = log_probs(head.logits(hidden[rows]))
        then, now = self.candidates[rows], propose(log_q, self.candidates.shape[-1])
        kept = (then.unsqueeze(-1) == now.unsqueeze(-2)).any(-1)
        drift = self.log_probs[rows] - log_q.gather(-1, self.sampled[rows].unsqueeze(-1)).squeeze(-1)
        return {"candidate_overlap": kept.float().mean(), "drift": drift.mean()}


def collate(samples: list[Sample], source: Source) -> Batch:
    """At least one sample -> a batch, every response beginning in the same column."""
    ids, attention, mask = align_responses([s["prompt_ids"] for s in samples], [s["response_ids"] for s in samples])
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "response_mask": mask,
        "recorded": source.recorded(samples),
    }


def response_ids(batch_ids: Tensor, response_mask: Tensor) -> Tensor:
    """Ids of a batch (batch, seq) -> those of the responses (tokens,)."""
    ids: Tensor = batch_ids[:, -response_mask.shape[1] :][response_mask]
    return ids


def predicting_hidden(hidden: Tensor, response_mask: Tensor) -> Tensor:
    """Hidden states of a batch (batch, seq, width) -> those that predict a response token (tokens, width)."""
    return hidden[:, -response_mask.shape[1] - 1 : -1][response_mask]


def empty_batch() -> Batch:
    """A batch without samples, for a process that must read along."""
    one = torch.ones(1, 1, dtype=torch.long)
    return {"input_ids": 0 * one, "attention_mask": one, "response_mask": one[:0].bool(), "recorded": {}}
