"""Samples made while training goes on: the student answers with its current weights, a live teacher reads along."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from tsdkd.artifacts.reader import Artifact
from tsdkd.core import Head, TeacherHidden
from tsdkd.errors import InputError
from tsdkd.stages.config.train import OnlineConfig
from tsdkd.stages.data.offline import ROLLOUT_COLUMNS
from tsdkd.stages.data.prompts import Prompts
from tsdkd.stages.data.randomness import random_integer, random_uniform
from tsdkd.stages.data.requests import Request
from tsdkd.stages.data.sources import Batch, Sample, predicting_hidden
from tsdkd.stages.models.distributed import unsharded
from tsdkd.stages.models.load import LanguageModel
from tsdkd.stages.models.tokenizers import chat_token_ids


class ResponseSampler(Protocol):
    """Answers with the student's weights as they are now."""

    def sample(self, student: LanguageModel, requests: list[Request]) -> list[list[int]]: ...


class OnlineSource(torch.utils.data.Dataset[Sample]):
    """Prompts, perhaps with recorded responses; a share `student_fraction` of them is answered by the student each time."""

    def __init__(
        self,
        samples: list[Sample],
        teacher: LanguageModel,
        sampler: ResponseSampler,
        student_fraction: float,
        teacher_fraction: float = 0.0,
    ) -> None:
        """`teacher_fraction`: of the distribution that the sampler samples from."""
        self.samples = samples
        self.teacher_fraction = teacher_fraction
        self.teacher = teacher
        self.sampler = sampler
        self.student_fraction = student_fraction

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def length(self, index: int) -> int:
        return len(self.samples[index]["prompt_ids"]) + len(self.samples[index]["response_ids"])

    def prompt_id(self, index: int) -> str:
        return str(self.samples[index]["prompt_id"])

    def with_responses(
        self, samples: list[Sample], student: LanguageModel, key: Sequence[int], progress: float = 0.0
    ) -> list[Sample]:
        asked = [i for i, s in enumerate(samples) if not s["response_ids"] or self._is_fresh(s, key)]
        requests = [self._job(samples[i], key) for i in asked]
        found = list(samples)
        student = unsharded(student) if self.student_fraction else student
        for i, ids in zip(asked, self.sampler.sample(student, requests) if requests else [], strict=True):
            reason = "stop" if ids[-1] in student.end_ids else "length"
            found[i] = samples[i] | {"response_ids": ids, "finish_reason": reason}
        return found

    @staticmethod
    def _job(sample: Sample, key: Sequence[int]) -> Request:
        sample_id = sample["sample_id"]
        return Request(sample_id, sample["prompt_ids"], random_integer(*key, sample_id))

    def _is_fresh(self, sample: Sample, key: Sequence[int]) -> bool:
        return random_uniform(*key, "fresh", sample["sample_id"]) < self.student_fraction

    def recorded(self, samples: list[Sample]) -> dict[str, Tensor]:
        return {}

    def signal(self, batch: Batch) -> TeacherHidden:
        device, mask = self.teacher.device, batch["response_mask"]
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            hidden = self.teacher.hidden(batch["input_ids"].to(device), batch["attention_mask"].to(device))
            return TeacherHidden(predicting_hidden(hidden, mask.to(device)).to(mask.device), self._head(mask.device))

    def scoring_snapshot(self, batch: Batch) -> None:
        return None

    @lru_cache(maxsize=1)  # noqa: B019  one object a run
    def _head(self, device: torch.device) -> Head:
        return self.teacher.head.to(device)


def samples_from_prompts(prompts: Prompts, student: LanguageModel, longest: int) -> tuple[list[Sample], int]:
    """Prompts as samples without responses, and how many were too long. Raises InputError."""
    samples = [
        {"sample_id": prompt.prompt_id, "prompt_id": prompt.prompt_id, "response_ids": [], "finish_reason": ""}
        | {"prompt_ids": chat_token_ids(student.tokenizer, prompt.messages)}
        for prompt in prompts
    ]
    kept = [s for s in samples if len(s["prompt_ids"]) <= longest]
    if not kept:
        raise InputError(
            f"All {len(samples)} prompts of {prompts.place} are longer than {longest} tokens.",
            "Raise --max-prompt-tokens.",
        )
    return kept, len(samples) - len(kept)


def samples_from_rollouts(rollouts: Artifact, limit: int | None) -> list[Sample]:
    """Rollouts of the first prompts as samples that have a response already."""
    rows = rollouts.table().select(ROLLOUT_COLUMNS).to_pylist()
    chosen = set(list(dict.fromkeys(row["prompt_id"] for row in rows))[:limit])
    return [row for row in rows if row["prompt_id"] in chosen]


def longest_sequence(samples: list[Sample], config: OnlineConfig) -> int:
    """Tokens that a prompt and its response, recorded or sampled, can reach."""
    sampled = config.sampling.max_new_tokens if config.student_fraction or config.replay else 0
    return max(len(s["prompt_ids"]) + max(sampled, len(s["response_ids"])) for s in samples)
