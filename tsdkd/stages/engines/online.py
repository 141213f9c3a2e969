"""Sampling during online training, with an engine in the training process."""

from dataclasses import dataclass, replace

import torch

from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.requests import Request, RequestBatch, Response
from tsdkd.stages.engines.both_models import BothModelsEngine
from tsdkd.stages.engines.protocol import Engine
from tsdkd.stages.engines.transformers_engine import TransformersEngine
from tsdkd.stages.models.adaptable import base_with_adapters
from tsdkd.stages.models.distributed import unsharded
from tsdkd.stages.models.language_model import LanguageModel


@dataclass
class LocalSampler:
    """Samples responses of the current student, alone or with the teacher; leaves the global random state as it was."""

    sampling: GenerateConfig
    teacher: LanguageModel | None = None
    """Set for teacher-mixed responses."""
    student: LanguageModel | None = None
    """The student with all its weights, between an update and the sampling."""

    def update(self, student: LanguageModel, requests: list[Request]) -> None:
        """All ranks call it together: they gather a sharded student."""
        whole = unsharded(student)
        self.student = replace(whole, model=base_with_adapters(whole.model))

    def sample(self, requests: list[Request]) -> list[Response]:
        student, self.student = self.student, None
        assert student is not None
        if not requests:
            return []
        devices = [student.device] if student.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            if self.teacher:
                return sample_requests(BothModelsEngine(student, self.teacher, self.sampling), requests)
            return sample_requests(TransformersEngine(student, self.sampling), requests)


def sample_requests(engine: Engine, requests: list[Request]) -> list[Response]:
    """A response to each request, sampled as one batch."""
    ((_, responses),) = engine.sample(iter([RequestBatch(requests)]), lambda _: None)
    return responses
