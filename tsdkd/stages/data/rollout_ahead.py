"""Online samples whose responses are sampled one step ahead: while the student learns those of the step before.

The student has made one update since.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from tsdkd.core import TeacherSignal
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.batches import Batch
from tsdkd.stages.data.online import LOG_PROBS, OnlineSource, ResponseSampler, response_columns
from tsdkd.stages.data.online_teachers import OnlineTeacher
from tsdkd.stages.data.requests import Response
from tsdkd.stages.data.source import COMPARED_TOKENS, Sample, SamplingSnapshot, sample_turns
from tsdkd.stages.metrics.step_times import timed
from tsdkd.stages.models.distributed import gather
from tsdkd.stages.models.language_model import LanguageModel

SNAPSHOT = "sampling "
"""Prefix of the recorded columns of a batch that make a `SamplingSnapshot`."""


class AheadSource(OnlineSource):
    """Samples whose responses of the next step are sampled while the student learns those of this one."""

    def __init__(
        self,
        samples: list[Sample],
        teacher: OnlineTeacher,
        sampler: ResponseSampler,
        student_fraction: float,
        sampling: GenerateConfig,
    ) -> None:
        """Arguments as for `OnlineSource`; the sampler gives log-probabilities, and may sample in another thread."""
        super().__init__(samples, teacher, sampler, student_fraction)
        self.sampling = sampling
        self.age = 0
        """The student's updates between its sampling of this step's responses and its learning of them."""
        self._thread = ThreadPoolExecutor(1)
        self._sampling: tuple[list[str], Future[list[Response]]] | None = None
        """The sample ids of this rank's requests for the next step, and their responses."""
        self._sampled: dict[str, Sample] | None = None
        """The columns of responses for the next step, by sample id, of all ranks after a resume."""

    def sample_ahead(self, samples: list[Sample], student: LanguageModel, key: Sequence[int]) -> None:
        """Start to sample the responses of the step of `key`. All ranks call it together, with samples or without."""
        requests = self.requests(samples, key)
        self._sampled = {}
        if any(gather([bool(requests)])):
            with timed("transfer"):
                self.sampler.update(student, list(requests.values()))
            self._sampling = list(requests), self._thread.submit(self.sampler.sample, list(requests.values()))

    def with_responses(
        self, samples: list[Sample], student: LanguageModel, key: Sequence[int], progress: float = 0.0
    ) -> list[Sample]:
        """Samples without responses of `sample_ahead` are those of a run's first step."""
        with timed("sampling"):
            sampled, self._sampled = self._wait(), None
        self.age = int(sampled is not None)
        if sampled is None:
            return super().with_responses(samples, student, key, progress)
        return [sample | sampled.get(sample["sample_id"], {}) for sample in samples]

    def _wait(self) -> dict[str, Sample] | None:
        if self._sampling:
            ids, responses = self._sampling
            columns = (response_columns(response, self.author) for response in responses.result())
            self._sampled = dict(zip(ids, columns, strict=True))
            self._sampling = None
        return self._sampled

    def state_dict(self) -> dict[str, Any]:
        """The responses for the next step, of all ranks, which call it together."""
        sampled = self._wait()
        return {"sampled": None if sampled is None else dict(gather(list(sampled.items())))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sampled = state["sampled"]

    def recorded(self, samples: list[Sample]) -> dict[str, Tensor]:
        """Also the columns of a `SamplingSnapshot`, if responses have log-probabilities of the tokens as sampled."""
        lengths = [sum(map(len, sample_turns(sample))) for sample in samples]
        rows = torch.arange(sum(lengths)).split(lengths)
        known = [i for i, sample in enumerate(samples) if LOG_PROBS in sample]
        if not known or self.sampling.top_p < 1:  # a nucleus that moves makes some of its tokens impossible
            return super().recorded(samples)
        columns = {
            "rows": torch.cat([rows[i] for i in known]),
            "ids": torch.tensor([token for i in known for token in samples[i]["response_ids"]]),
            "log_probs": torch.tensor([value for i in known for value in samples[i][LOG_PROBS]]),
        }
        count = min(COMPARED_TOKENS, len(columns["rows"]))
        chosen = torch.linspace(0, len(columns["rows"]) - 1, count).long()
        return super().recorded(samples) | {SNAPSHOT + name: values[chosen] for name, values in columns.items()}

    def signal(self, batch: Batch) -> TeacherSignal:
        recorded = {name: values for name, values in batch["recorded"].items() if not name.startswith(SNAPSHOT)}
        return super().signal(batch | {"recorded": recorded})

    def scoring_snapshot(self, batch: Batch) -> SamplingSnapshot | None:
        columns = {
            name.removeprefix(SNAPSHOT): values
            for name, values in batch["recorded"].items()
            if name.startswith(SNAPSHOT)
        }
        return SamplingSnapshot(temperature=self.sampling.temperature or 1.0, **columns) if columns else None
