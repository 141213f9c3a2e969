"""Samples made while training goes on: the student answers with its current weights, a live teacher reads along."""

from dataclasses import dataclass

import torch

from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.requests import Request, RequestBatch
from tsdkd.stages.engines.both_models import BothModelsEngine
from tsdkd.stages.engines.protocol import Engine
from tsdkd.stages.engines.transformers_engine import TransformersEngine
from tsdkd.stages.models.load import LanguageModel


@dataclass(frozen=True)
class LocalSampler:
    """The student answers itself, or together with a teacher."""

    sampling: GenerateConfig
    teacher: LanguageModel | None = None

    def sample(self, student: LanguageModel, requests: list[Request]) -> list[list[int]]:
        devices = [student.device] if student.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            if self.teacher:
                return sample_requests(BothModelsEngine(student, self.teacher, self.sampling), requests)
            return sample_requests(TransformersEngine(student, self.sampling), requests)


def sample_requests(engine: Engine, requests: list[Request]) -> list[list[int]]:
    """An engine's responses to one list of requests."""
    ((_, responses),) = engine.sample(iter([RequestBatch(requests)]), lambda _: None)
    return [response.ids for response in responses]
