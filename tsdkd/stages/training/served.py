"""The student answering through vLLM while it learns: after each update its weights go over in shared memory."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from tsdkd.stages.config import GenerateConfig
from tsdkd.stages.models import LanguageModel
from tsdkd.stages.outline import outline
from tsdkd.stages.rollouts.canary import agree
from tsdkd.stages.rollouts.jobs import Job
from tsdkd.stages.rollouts.vllm_engine import VllmEngine
from tsdkd.stages.training.live import ask
from tsdkd.stages.training.lora import plain_weights

SHARED_MEMORY = Path("/dev/shm")


class Served:
    """A `live.Speaker`. Every sync is proved: what vLLM then says is compared with the student itself."""

    def __init__(self, engine: VllmEngine, sampling: GenerateConfig, exchange: Path) -> None:
        self.engine = engine
        self.sampling = sampling
        self.exchange = exchange

    def answer(self, student: LanguageModel, jobs: list[Job]) -> list[list[int]]:
        """Raises TsdkdError when the engine speaks with other weights than the student's."""
        dtype = getattr(torch, self.sampling.dtype)
        weights = {
            name: value.detach().to("cpu", dtype).contiguous() for name, value in plain_weights(student.model).items()
        }
        save_file(weights, self.exchange / "model.safetensors")
        del weights  # on a CPU vLLM needs the room
        self.engine.reload(self.exchange)
        agree(self.engine, jobs, student, self.sampling, self.sampling.dtype)
        return ask(self.engine, jobs)


@contextmanager
def served(student: str, sampling: GenerateConfig, longest: int) -> Iterator[Served]:
    """vLLM with a student's weights; `sampling` names the precision. Raises TsdkdError when vLLM cannot serve it."""
    model = outline(student)
    place = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="tsdkd-weights-", dir=place) as directory:
        exchange = Path(directory)
        for file in model.directory.glob("*.json"):
            shutil.copy(file, exchange)
        with VllmEngine(model, replace(sampling, data_parallel=1), longest) as engine:
            yield Served(engine, sampling, exchange)
