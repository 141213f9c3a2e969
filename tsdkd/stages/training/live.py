"""Samples made while training goes on: the student answers with its current weights, a live teacher reads along."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from tsdkd.artifacts import Artifact, digest
from tsdkd.core import Head, TeacherHidden
from tsdkd.errors import InputError
from tsdkd.stages.config import GenerateConfig, LiveConfig
from tsdkd.stages.models import LanguageModel, chat_ids
from tsdkd.stages.rollouts.jobs import Engine, Job, Part
from tsdkd.stages.rollouts.prompts import Prompt, Prompts
from tsdkd.stages.rollouts.sampling import TransformersEngine
from tsdkd.stages.rollouts.together import TogetherEngine
from tsdkd.stages.samples.sources import Batch, Sample, predicting
from tsdkd.stages.samples.staged import COLUMNS
from tsdkd.stages.training.sharing import whole


class Speaker(Protocol):
    """Answers with the student's weights as they are now."""

    def answer(self, student: LanguageModel, jobs: list[Job]) -> list[list[int]]: ...


@dataclass(frozen=True)
class Here:
    """The student answers itself, or together with a teacher."""

    sampling: GenerateConfig
    teacher: LanguageModel | None = None

    def answer(self, student: LanguageModel, jobs: list[Job]) -> list[list[int]]:
        devices = [student.device] if student.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            if self.teacher:
                return ask(TogetherEngine(student, self.teacher, self.sampling), jobs)
            return ask(TransformersEngine(student, self.sampling), jobs)


class LiveSamples(torch.utils.data.Dataset[Sample]):
    """Prompts, perhaps with recorded responses; a share `on_policy` of them is answered by the student each time."""

    def __init__(
        self,
        samples: list[Sample],
        teacher: LanguageModel,
        speaker: Speaker,
        on_policy: float,
        teacher_share: float = 0.0,
    ) -> None:
        """`teacher_share`: of the distribution that the speaker samples from."""
        self.samples = samples
        self.teacher_share = teacher_share
        self.teacher = teacher
        self.speaker = speaker
        self.on_policy = on_policy

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def length(self, index: int) -> int:
        return len(self.samples[index]["prompt_ids"]) + len(self.samples[index]["response_ids"])

    def prompt_of(self, index: int) -> str:
        return str(self.samples[index]["prompt_id"])

    def answered(
        self, samples: list[Sample], student: LanguageModel, key: Sequence[int], progress: float = 0.0
    ) -> list[Sample]:
        asked = [i for i, s in enumerate(samples) if not s["response_ids"] or self._is_fresh(s, key)]
        jobs = [self._job(samples[i], key) for i in asked]
        found = list(samples)
        student = whole(student) if self.on_policy else student
        for i, ids in zip(asked, self.speaker.answer(student, jobs) if jobs else [], strict=True):
            reason = "stop" if ids[-1] in student.end_ids else "length"
            found[i] = samples[i] | {"response_ids": ids, "finish_reason": reason}
        return found

    @staticmethod
    def _job(sample: Sample, key: Sequence[int]) -> Job:
        sample_id = sample["sample_id"]
        return Job(sample_id, Prompt(sample["prompt_id"], "", []), sample["prompt_ids"], number(*key, sample_id))

    def _is_fresh(self, sample: Sample, key: Sequence[int]) -> bool:
        return number(*key, "fresh", sample["sample_id"]) < self.on_policy * 2**60

    def recorded(self, samples: list[Sample]) -> dict[str, Tensor]:
        return {}

    def signal(self, batch: Batch) -> TeacherHidden:
        device, mask = self.teacher.device, batch["response_mask"]
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            hidden = self.teacher.hidden(batch["input_ids"].to(device), batch["attention_mask"].to(device))
            return TeacherHidden(predicting(hidden, mask.to(device)).to(mask.device), self._head(mask.device))

    def memory(self, batch: Batch) -> None:
        return None

    @lru_cache(maxsize=1)  # noqa: B019  one object a run
    def _head(self, device: torch.device) -> Head:
        return self.teacher.head.to(device)


def from_prompts(prompts: Prompts, student: LanguageModel, longest: int) -> tuple[list[Sample], int]:
    """Prompts as samples without responses, and how many were too long. Raises InputError."""
    samples = [
        {"sample_id": prompt.prompt_id, "prompt_id": prompt.prompt_id, "response_ids": [], "finish_reason": ""}
        | {"prompt_ids": chat_ids(student.tokenizer, prompt.messages)}
        for prompt in prompts
    ]
    kept = [s for s in samples if len(s["prompt_ids"]) <= longest]
    if not kept:
        raise InputError(
            f"All {len(samples)} prompts of {prompts.place} are longer than {longest} tokens.",
            "Raise --max-prompt-tokens.",
        )
    return kept, len(samples) - len(kept)


def from_rollouts(rollouts: Artifact, limit: int | None) -> list[Sample]:
    """Rollouts of the first prompts as samples that have a response already."""
    rows = rollouts.table().select(COLUMNS).to_pylist()
    chosen = set(list(dict.fromkeys(row["prompt_id"] for row in rows))[:limit])
    return [row for row in rows if row["prompt_id"] in chosen]


def require_room(samples: list[Sample], models: Sequence[LanguageModel], config: LiveConfig) -> int:
    """Tokens that a prompt and its response can reach. Raises InputError when a model's context is shorter."""
    fresh = config.sampling.max_new_tokens if config.on_policy or config.replay else 0
    longest = max(len(s["prompt_ids"]) + max(fresh, len(s["response_ids"])) for s in samples)
    for model in models:
        if longest > model.context:
            raise InputError(
                f"A prompt and its response could reach {longest} tokens; {model.name} reads {model.context}.",
                "Lower --max-new-tokens or --max-prompt-tokens.",
            )
    return longest


def ask(engine: Engine, jobs: list[Job]) -> list[list[int]]:
    """An engine's responses to one list of jobs."""
    ((_, responses),) = engine.answer(iter([Part("", "student", jobs)]), lambda _: None)
    return [response.ids for response in responses]


def number(*key: int | str) -> int:
    """Below 2**60, spread evenly."""
    return int(digest(list(key))[:15], 16)
