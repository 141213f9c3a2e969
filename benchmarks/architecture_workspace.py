"""A directory with a student, a teacher and the artifacts of one architecture, and the reference values."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.architecture_models import reference, save_model
from tests.helpers.prompts import write_prompts
from tsdkd.artifacts.reader import read_artifact
from tsdkd.stages.data.prompts import Prompts
from tsdkd.stages.models.tokenizers import chat_token_ids, load_tokenizer, vocab_size

TOLERANCE = 5e-5
"""Nats, or logits of a standard deviation of about 1."""


class MismatchError(Exception):
    """A stage's values differ from the reference."""


def compare(what: str, values: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    values, expected = torch.as_tensor(values).double(), torch.as_tensor(expected).double()
    if values.shape != expected.shape:
        raise MismatchError(f"{what}: shape {tuple(values.shape)}, expected {tuple(expected.shape)}")
    largest = float((values - expected).abs().max())
    if not largest <= tolerance * max(1, float(expected.abs().max())):
        raise MismatchError(f"{what}: differs by {largest:.2g}")


@dataclass
class Workspace:
    """One directory: a student and a teacher of one architecture, and the artifacts that the checks write."""

    directory: Path
    architecture: str

    def __post_init__(self) -> None:
        write_prompts(self.prompts, 6)
        save_model(self.architecture, self.student, 1)
        save_model(self.architecture, self.teacher, 2)

    @property
    def prompts(self) -> Path:
        return self.directory / "prompts.jsonl"

    @property
    def student(self) -> Path:
        return self.directory / "student"

    @property
    def teacher(self) -> Path:
        return self.directory / "teacher"

    @cached_property
    def student_reference(self) -> PreTrainedModel:
        return reference(self.student)

    @cached_property
    def teacher_reference(self) -> PreTrainedModel:
        return reference(self.teacher)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(str(self.student))

    @cached_property
    def vocab(self) -> int:
        """The number of the tokenizer's ids; some tokenizer classes add one."""
        return vocab_size(self.tokenizer)

    @cached_property
    def prompt_ids(self) -> list[list[int]]:
        return [chat_token_ids(self.tokenizer, prompt.messages) for prompt in Prompts(self.prompts)]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return read_artifact(self.directory / "rollouts", "rollouts").table().to_pylist()

    @cached_property
    def sequences(self) -> list[list[int]]:
        return [row["prompt_ids"] + row["response_ids"] for row in self.rows]

    def logits(self, model: Any, ids: list[int]) -> Tensor:
        """The logits (seq, vocab) of one sequence."""
        logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :, : self.vocab].float()
        return logits

    def response_logits(self, model: Any) -> list[Tensor]:
        """The logits (tokens, vocab) of each response."""
        return [
            self.logits(model, ids)[len(row["prompt_ids"]) - 1 : -1]
            for row, ids in zip(self.rows, self.sequences, strict=True)
        ]

    def all_logits(self, model: Any) -> Tensor:
        """The logits of every position of prompts and responses."""
        with torch.no_grad():
            return torch.cat([self.logits(model, ids) for ids in self.sequences])


def divergence(logits: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The mean KL per token between pairs of logits (seq, vocab)."""
    pairs = [(p.log_softmax(-1), q.log_softmax(-1)) for p, q in logits]
    return torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean()
