"""The teacher's signal on its way from `score` to whoever learns or is measured: how rows of scores encode it.

What a token costs on disk, how it is written, and how it becomes a `TeacherSignal` again, side by side.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tsdkd.core import Head, TeacherHidden, TeacherRanks, TeacherSignal, TeacherTopK, TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.config import ScoreConfig

HEAD_FILE = "teacher_head.safetensors"
LIGHT = ("student_entropy", "teacher_entropy", "student_logprob", "teacher_logprob", "candidates", "ranks")
HEAVY = {"hidden": ("hidden",), "topk": ("top_ids", "top_logprobs"), "ranks": ()}


def bytes_per_token(config: ScoreConfig, width: int, dtype: torch.dtype) -> int:
    """Before compression; `width` is the teacher's hidden size."""
    light = 4 * 4 + config.k * (4 + 2)
    return light + {"hidden": width * dtype.itemsize, "topk": config.top_k * 8, "ranks": 0}[config.signal]


def to_bytes(hidden: Tensor) -> bytes:
    """Hidden states (tokens, width) in their own dtype."""
    return hidden.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def save_head(head: Head, path: Path) -> None:
    """Only the rows of real tokens are kept."""
    tensors = {"weight": head.weight[: head.vocab_size].clone()}
    if head.bias is not None:
        tensors["bias"] = head.bias[: head.vocab_size].clone()
    facts = {"head": json.dumps({"logit_scale": head.logit_scale, "softcap": head.softcap})}  # one key: order is random
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, metadata=facts)


def load_head(path: Path) -> Head:
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["head"])
        return Head(
            weight=file.get_tensor("weight"),
            bias=file.get_tensor("bias") if "bias" in file.keys() else None,  # noqa: SIM118 - not a dict
            logit_scale=facts["logit_scale"],
            softcap=facts["softcap"],
            vocab_size=file.get_tensor("weight").shape[0],
        )


@dataclass(frozen=True, slots=True)
class Decoder:
    """Turns rows of one scores artifact back into tensors and signals."""

    signal: str
    k: int
    top_k: int
    head: Head | None
    """The teacher's, with the signal "hidden"."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (*LIGHT, *HEAVY[self.signal])

    def to(self, device: torch.device) -> "Decoder":
        return replace(self, head=None if self.head is None else self.head.to(device))

    def require(self, objective: TSDKDConfig) -> None:
        """Raise InputError when what was recorded cannot serve an objective."""
        vocab = self.head.weight.shape[0] if self.head is not None else self.k + 1
        if objective.alpha and objective.k >= vocab:
            remedy = "Lower --k." if self.head is not None else "Lower --k, or score again with a larger one."
            raise InputError(f"k is {objective.k}, but these scores allow only {vocab - 1}.", remedy)
        if self.signal == "ranks" and objective.direct_weight:
            raise InputError(
                "Scores with the signal 'ranks' carry no distribution, so the direct term cannot be formed.",
                "Give --direct-weight 0, or score with --signal hidden or topk.",
            )
        if self.signal != "hidden" and objective.temperature != 1:
            raise InputError(
                f"Scores with the signal {self.signal!r} hold at temperature 1, not {objective.temperature}.",
                "Score with --signal hidden, or train at temperature 1.",
            )

    def tensors(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Rows of scores -> tensors over all their tokens, row after row."""
        flat = {name: _concat(rows, name) for name in self.columns if name != "hidden"}
        shapes = {"candidates": self.k, "ranks": self.k, "top_ids": self.top_k, "top_logprobs": self.top_k}
        tensors = {name: value.reshape(-1, shapes[name]) if name in shapes else value for name, value in flat.items()}
        if self.head is not None:
            raw = torch.frombuffer(bytearray(b"".join(row["hidden"] for row in rows)), dtype=self.head.weight.dtype)
            tensors["hidden"] = raw.reshape(-1, self.head.weight.shape[1])
        return tensors

    def decode(self, tensors: dict[str, Tensor]) -> TeacherSignal | TeacherHidden:
        """What `tensors` made (perhaps moved to another device) -> the teacher's signal."""
        if self.head is not None:
            return TeacherHidden(tensors["hidden"], self.head)
        ranks = TeacherRanks(tensors["teacher_entropy"], tensors["candidates"], tensors["ranks"])
        if self.signal == "ranks":
            return ranks
        return TeacherTopK(ranks, tensors["top_ids"], tensors["top_logprobs"])


def _concat(rows: list[dict[str, Any]], name: str) -> Tensor:
    joined = np.concatenate([row[name] for row in rows])
    return torch.from_numpy(joined.astype(np.int64 if joined.dtype.kind == "i" else np.float32))
