"""Sampling during online training with vLLM, which reloads the student's weights before each batch."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.requests import Request, Response
from tsdkd.stages.engines.engine_check import compare_with_model
from tsdkd.stages.engines.online import sample_requests
from tsdkd.stages.engines.vllm_engine import VllmEngine
from tsdkd.stages.models.load import LanguageModel
from tsdkd.stages.models.merged_weights import merged_state_dict
from tsdkd.stages.models.spec import ModelSpec

SHARED_MEMORY = Path("/dev/shm")


class VllmSampler:
    """Samples responses of the current student; each reload is followed by an engine check against the student."""

    def __init__(self, engine: VllmEngine, sampling: GenerateConfig, weights_directory: Path) -> None:
        """`weights_directory` holds the student's config; its weights are rewritten for each reload."""
        self.engine = engine
        self.sampling = sampling
        self.weights_directory = weights_directory

    def sample(self, student: LanguageModel, requests: list[Request]) -> list[Response]:
        """Raises TsdkdError when the engine's weights differ from the student's."""
        dtype = getattr(torch, self.sampling.dtype)
        weights = {
            name: value.detach().to("cpu", dtype).contiguous()
            for name, value in merged_state_dict(student.model).items()
        }
        save_file(weights, self.weights_directory / "model.safetensors")
        del weights  # vLLM on a CPU needs the memory
        self.engine.reload(self.weights_directory)
        compare_with_model(self.engine, requests, student, self.sampling, self.sampling.dtype)
        return sample_requests(self.engine, requests)


@contextmanager
def open_vllm_sampler(student: ModelSpec, sampling: GenerateConfig, max_tokens: int) -> Iterator[VllmSampler]:
    """Start vLLM with a student, in the precision `sampling.dtype`, for sequences of up to `max_tokens`.

    It samples ids below `student.vocab` alone, which the teacher knows too, and ends with `student.end_ids`.

    Weights pass through shared memory where the system has it. Raises TsdkdError when vLLM cannot serve the model.
    """
    parent = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="tsdkd-weights-", dir=parent) as directory:
        weights_directory = Path(directory)
        for file in student.directory.glob("*.json"):
            shutil.copy(file, weights_directory)
        with VllmEngine(student, sampling, max_tokens) as engine:
            yield VllmSampler(engine, sampling, weights_directory)
