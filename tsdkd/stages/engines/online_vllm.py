"""The student answering through vLLM while it learns: after each update its weights go over in shared memory."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.requests import Request
from tsdkd.stages.engines.engine_check import check_against_model
from tsdkd.stages.engines.online import sample_requests
from tsdkd.stages.engines.vllm_engine import VllmEngine
from tsdkd.stages.models.load import LanguageModel
from tsdkd.stages.models.lora import merged_state_dict
from tsdkd.stages.models.spec import load_spec

SHARED_MEMORY = Path("/dev/shm")


class VllmSampler:
    """A `live.Speaker`. Every sync is proved: what vLLM then says is compared with the student itself."""

    def __init__(self, engine: VllmEngine, sampling: GenerateConfig, exchange: Path) -> None:
        self.engine = engine
        self.sampling = sampling
        self.exchange = exchange

    def sample(self, student: LanguageModel, requests: list[Request]) -> list[list[int]]:
        """Raises TsdkdError when the engine speaks with other weights than the student's."""
        dtype = getattr(torch, self.sampling.dtype)
        weights = {
            name: value.detach().to("cpu", dtype).contiguous()
            for name, value in merged_state_dict(student.model).items()
        }
        save_file(weights, self.exchange / "model.safetensors")
        del weights  # on a CPU vLLM needs the room
        self.engine.reload(self.exchange)
        check_against_model(self.engine, requests, student, self.sampling, self.sampling.dtype)
        return sample_requests(self.engine, requests)


@contextmanager
def open_vllm_sampler(student: str, sampling: GenerateConfig, longest: int) -> Iterator[VllmSampler]:
    """vLLM with a student's weights; `sampling` names the precision. Raises TsdkdError when vLLM cannot serve it."""
    model = load_spec(student)
    place = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="tsdkd-weights-", dir=place) as directory:
        exchange = Path(directory)
        for file in model.directory.glob("*.json"):
            shutil.copy(file, exchange)
        with VllmEngine(model, replace(sampling, data_parallel=1), longest) as engine:
            yield VllmSampler(engine, sampling, exchange)
