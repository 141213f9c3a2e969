"""vLLM as a reader: student and teacher, each in a child process, side by side in the device's memory.

The teacher may be spread over GPUs and quantised. The student is on one GPU, in the precision that it trains from.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from tsdkd.core import Head
from tsdkd.errors import TsdkdError
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.hidden_reader import HiddenReader
from tsdkd.stages.engines.reader_check import check_reader, checked_sequences, expected_log_probs
from tsdkd.stages.engines.vllm_engine import EngineProcess
from tsdkd.stages.engines.vllm_reading import read_hidden
from tsdkd.stages.models.device import default_device, total_memory
from tsdkd.stages.models.head import load_head
from tsdkd.stages.models.merged import merged_model_directory
from tsdkd.stages.models.spec import ModelSpec, load_spec
from tsdkd.stages.models.weights import weight_bytes
from tsdkd.stages.observer import Observer
from tsdkd.stages.parallel.tasks import one_at_a_time

MAX_SEQUENCES = 256
"""Sequences that vLLM reads at a time; its own default for a server."""
MEMORY_REMEDY = "Change --memory-fraction, lower --batch-tokens, or raise --tensor-parallel"
ReaderPair = tuple["VllmReader", "VllmReader"]
"""Student and teacher."""


class VllmReader(HiddenReader):
    """One model in a child process; a context manager."""

    def __init__(self, spec: ModelSpec, head: Head, arguments: dict[str, Any]) -> None:
        """`arguments`: as `reading_arguments` returns them."""
        self.name, self.head, self.device = spec.name, head, head.weight.device
        self._arguments = arguments | {"hf_overrides": {"head_dtype": "model"}}  # else states become float32
        self._lengths: list[int] = []

    def __enter__(self) -> Self:
        """Start the process. Raises TsdkdError when vLLM cannot read the model."""
        self._process = EngineProcess(self._arguments, reply=read_hidden, memory_remedy=MEMORY_REMEDY)
        try:
            self._process.receive_outputs()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.close()

    def start(self, sequences: Sequence[Sequence[int]]) -> None:
        self._lengths = [len(ids) for ids in sequences]
        self._process.send([list(ids) for ids in sequences])

    def finish(self) -> list[Tensor]:
        """Raises TsdkdError when vLLM fails, or returns states of another shape."""
        announced: Any = self._process.receive_outputs()
        dtype, shape = announced
        hidden = self._process.receive_tensor(shape, getattr(torch, dtype))
        width = self.head.weight.shape[1]
        if tuple(hidden.shape) != (sum(self._lengths), width):
            raise TsdkdError(
                f"vLLM returned hidden states of shape {tuple(hidden.shape)} for {sum(self._lengths)} tokens of "
                f"{self.name}, whose head reads {width} numbers a token.",
                "Use --engine transformers.",
            )
        return list(hidden.split(self._lengths))


@contextmanager
def open_readers(
    student: str,
    teacher: str,
    config: ScoreConfig,
    longest: int,
    sequences: list[list[int]],
    observer: Observer,
    vocab: int | None = None,
) -> Iterator[ReaderPair]:
    """Student and teacher, read by vLLM, for sequences of up to `longest` tokens; adapters are merged first.

    `vocab`: the number of ids that are compared; None: of those that both models know. Both models are checked on some
    of `sequences` before they are returned. Raises InputError for a head that is not linear, TsdkdError when vLLM
    cannot read a model, when both exceed the memory, and when a check fails.
    """
    specs = load_spec(student), load_spec(teacher)
    vocab, device = vocab or min(spec.vocab for spec in specs), default_device()
    checked = checked_sequences(sequences)
    with ExitStack() as stack:
        directories = [stack.enter_context(merged_model_directory(spec.name, config.dtype)) for spec in specs]
        merged_student, merged_teacher = merged = [
            replace(spec, directory=directory, adapter=None, vocab=vocab)
            for spec, directory in zip(specs, directories, strict=True)
        ]
        readers, checks = [], []
        arguments_of_both = reading_arguments(merged_student, merged_teacher, config, longest)
        for spec, arguments in zip(merged, arguments_of_both, strict=True):
            head = load_head(spec, arguments["dtype"])
            with one_at_a_time():
                checks.append(expected_log_probs(spec, arguments, checked))
            readers.append(VllmReader(spec, head.to(torch.device(device)), arguments))
        for reader, expected in zip(readers, checks, strict=True):  # one after the other: each measures free memory
            stack.enter_context(reader)
            observer.info(check_reader(reader, checked, expected))
        yield readers[0], readers[1]


def reading_arguments(
    student: ModelSpec, teacher: ModelSpec, config: ScoreConfig, longest: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of vLLM's `LLM` for student and teacher.

    `config.memory_fraction` is divided so that both have the same memory beside their weights. No sequence is read in
    parts and no prefix is shared, so that the states of a sequence do not depend on those before it.
    """
    total = total_memory(default_device())
    weights = weight_bytes(student.directory) / total, weight_bytes(teacher.directory) / total / config.tensor_parallel
    rest = config.memory_fraction - sum(weights)
    if rest <= 0:
        raise TsdkdError(
            f"The weights of both models need {sum(weights):.0%} of a device's memory, but --memory-fraction is "
            f"{config.memory_fraction:g}.",
            "Raise --tensor-parallel or --memory-fraction, or use --engine transformers --device-map auto.",
        )
    batched = max(config.batch_tokens, longest)
    common = {
        "trust_remote_code": False,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": False,
        "max_model_len": longest,
        "max_num_batched_tokens": batched,
        "max_num_seqs": min(MAX_SEQUENCES, batched),
    }
    student_arguments, teacher_arguments = (
        common
        | {
            "model": str(spec.directory),
            "dtype": spec.resolve_dtype(config.dtype),
            "gpu_memory_utilization": fraction + rest / 2,
        }
        for spec, fraction in zip((student, teacher), weights, strict=True)
    )
    return student_arguments, teacher_arguments | {
        "tensor_parallel_size": config.tensor_parallel,
        "quantization": config.quantization,
    }
