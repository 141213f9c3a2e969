"""Samples of online training: the current student samples responses, the teacher gives their signal."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tsdkd.artifacts.reader import Artifact
from tsdkd.core import TeacherSignal
from tsdkd.errors import InputError
from tsdkd.stages.config.train import OnlineConfig
from tsdkd.stages.data.batches import Batch
from tsdkd.stages.data.offline import ROLLOUT_COLUMNS
from tsdkd.stages.data.online_teachers import OnlineTeacher
from tsdkd.stages.data.prompt_tokens import prompt_token_ids
from tsdkd.stages.data.prompts import Prompts
from tsdkd.stages.data.randomness import random_integer, random_uniform
from tsdkd.stages.data.requests import Request, Response
from tsdkd.stages.data.rollout_teachers import SOURCE, TEACHER, naming_column
from tsdkd.stages.data.source import Sample, SamplingSnapshot, sample_length
from tsdkd.stages.metrics.step_times import timed
from tsdkd.stages.models.distributed import gather
from tsdkd.stages.models.language_model import LanguageModel

LOG_PROBS = "sampling_log_probs"
"""The key of the log-probabilities that a sample's response was sampled with, where the sampler gives them."""


class ResponseSampler(Protocol):
    """Samples responses with the student's weights of the last update. Each sampling needs an update before it."""

    def update(self, student: LanguageModel, requests: list[Request]) -> None:
        """Take over the student's weights. All ranks call it together; `requests`: this rank's next ones, or none."""

    def sample(self, requests: list[Request]) -> list[Response]:
        """One response per request."""


class OnlineSource(torch.utils.data.Dataset[Sample]):
    """Samples whose responses are recorded or sampled: each step draws which prompts the student responds to."""

    def __init__(
        self,
        samples: list[Sample],
        teacher: OnlineTeacher,
        sampler: ResponseSampler,
        student_fraction: float,
        teacher_fraction: float = 0.0,
    ) -> None:
        """`samples` without a response always get one from the student.

        `student_fraction`: the probability of a new response for the other samples. `teacher_fraction`: the teacher's
        weight in the mixture that the sampler samples from.
        """
        self.samples = samples
        self.teacher_fraction = teacher_fraction
        self.teacher = teacher
        self.sampler = sampler
        self.student_fraction = student_fraction

    @property
    def author(self) -> str:
        """The author of sampled responses."""
        return "mixture" if self.teacher_fraction else "student"

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def length(self, index: int) -> int:
        return sample_length(self.samples[index])

    def prompt_id(self, index: int) -> str:
        return str(self.samples[index]["prompt_id"])

    def with_responses(
        self, samples: list[Sample], student: LanguageModel, key: Sequence[int], progress: float = 0.0
    ) -> list[Sample]:
        """All ranks call it together, also those without samples."""
        requests = self.requests(samples, key)
        if not any(gather([bool(requests)])):
            return samples
        with timed("transfer"):
            self.sampler.update(student, list(requests.values()))
        with timed("sampling"):
            responses = dict(zip(requests, self.sampler.sample(list(requests.values())), strict=True))
        sampled = {sample_id: response_columns(response, self.author) for sample_id, response in responses.items()}
        return [sample | sampled.get(sample["sample_id"], {}) for sample in samples]

    def requests(self, samples: list[Sample], key: Sequence[int]) -> dict[str, Request]:
        """Those of the samples that get a new response in the step of `key`, by sample id."""
        chosen = [s for s in samples if not s["response_ids"] or self._student_responds(s, key)]
        return {sample["sample_id"]: make_request(sample, key) for sample in chosen}

    def _student_responds(self, sample: Sample, key: Sequence[int]) -> bool:
        return random_uniform(*key, "fresh", sample["sample_id"]) < self.student_fraction

    def read_ahead(self, samples: list[Sample]) -> list[Sample]:
        return self.teacher.read_ahead(samples)

    def recorded(self, samples: list[Sample]) -> dict[str, Tensor]:
        return self.teacher.recorded(samples)

    def signal(self, batch: Batch) -> TeacherSignal:
        return self.teacher.signal(batch)

    def scoring_snapshot(self, batch: Batch) -> SamplingSnapshot | None:
        return None


def response_columns(response: Response, author: str) -> Sample:
    """The columns of a sample that its new response replaces."""
    columns: Sample = {"response_ids": response.ids, "finish_reason": response.finish_reason}
    columns |= {"response_mask": None, "author": author}
    return columns if response.log_probs is None else columns | {LOG_PROBS: response.log_probs}


def make_request(sample: Sample, key: Sequence[int]) -> Request:
    """The request for a sample's response in the step of `key`."""
    sample_id = sample["sample_id"]
    return Request(sample_id, sample["prompt_ids"], random_integer(*key, sample_id))


def samples_from_prompts(
    prompts: Prompts, tokenizer: PreTrainedTokenizerBase, max_tokens: int, day: str | None = None
) -> tuple[list[Sample], int]:
    """Samples without responses for the prompts of 1 to `max_tokens` tokens, and the number of other prompts.

    A sample has the key "teacher" if prompts name their teachers. `day`: the day that the chat template writes.

    Raises InputError if no prompt fits.
    """
    samples = [
        {
            "sample_id": prompt.prompt_id,
            "prompt_id": prompt.prompt_id,
            "author": "",
            "response_ids": [],
            "finish_reason": "",
        }
        | {"prompt_ids": prompt_token_ids(tokenizer, prompt, day, max_tokens)}
        | ({"teacher": prompt.teacher} if prompt.teacher else {})
        for prompt in prompts
    ]
    fitting = [s for s in samples if 0 < len(s["prompt_ids"]) <= max_tokens]
    if not fitting:
        raise InputError(
            f"All {len(samples)} prompts of {prompts.path} are empty or longer than {max_tokens} tokens.",
            "Raise --max-prompt-tokens.",
        )
    return fitting, len(samples) - len(fitting)


def samples_from_rollouts(rollouts: Artifact, limit: int | None, teacher_by: str | None = None) -> list[Sample]:
    """Samples with recorded responses, of the first `limit` prompts.

    "teacher" is the name of each one's teacher, None without `teacher_by`, which is as `column_of_teachers` returns it.
    """
    rows = rollouts.table([*ROLLOUT_COLUMNS, SOURCE]).to_pylist()
    prompt_ids = set(list(dict.fromkeys(row["prompt_id"] for row in rows))[:limit])
    column = naming_column(rollouts, teacher_by) if teacher_by else None
    return [row | {TEACHER: column and row[column]} for row in rows if row["prompt_id"] in prompt_ids]


def longest_sequence(samples: list[Sample], config: OnlineConfig) -> int:
    """Tokens of the longest prompt with its response, recorded or sampled."""
    sampled = config.sampling.response_limit if config.samples_responses else 0
    return max(len(s["prompt_ids"]) + max(sampled, len(s["response_ids"])) for s in samples)
