"""The teacher's signal on its way from `score` to whoever learns or is measured: how rows of scores encode it.

What a token costs on disk, how it is written, and how it becomes a `TeacherSignal` again, side by side.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tsdkd.artifacts.schemas import SCHEMAS
from tsdkd.core import Head, TeacherHidden, TeacherRanks, TeacherSignal, TeacherTopK, TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.config.score import ScoreConfig

HEAD_FILE = "teacher_head.safetensors"
LIGHT_COLUMNS = ("student_entropy", "teacher_entropy", "student_log_prob", "teacher_log_prob", "candidates", "ranks")
SIGNAL_COLUMNS = {
    "hidden": ("hidden",),
    "hidden8": ("hidden", "hidden_scale"),
    "topk": ("top_ids", "top_log_probs"),
    "ranks": (),
}
SIGNALS_WITH_HEAD = {"hidden", "hidden8"}
LOSSY_SIGNALS = {"hidden8", "topk"}
"""Signals beside which score measures what they lose."""


def bytes_per_token(config: ScoreConfig, width: int, dtype: torch.dtype) -> int:
    """Before compression; `width` is the teacher's hidden size, `dtype` that of its head."""
    light = 4 * 4 + config.k * (4 + 2)
    measured = 2 * 4 if config.signal in LOSSY_SIGNALS else 0
    heavy = {"hidden": width * dtype.itemsize, "hidden8": width + 4, "topk": config.top_k * 8, "ranks": 0}
    return light + measured + heavy[config.signal]


def encode_signal(hidden: Tensor, log_p: Tensor, config: ScoreConfig) -> dict[str, Tensor]:
    """A teacher's hidden states (tokens, width) and log-probabilities (tokens, vocab) -> the signal's columns."""
    if config.signal == "hidden8":
        return dict(zip(("hidden", "hidden_scale"), to_int8(hidden), strict=True))
    if config.signal == "topk":
        top = log_p.topk(config.top_k, dim=-1)
        return {"top_ids": top.indices, "top_log_probs": top.values}
    return {"hidden": hidden} if config.signal == "hidden" else {}


def to_int8(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (tokens, width) -> int8 of the same shape, and what each row was divided by (tokens,)."""
    scale = hidden.float().abs().amax(-1) / 127
    return (hidden.float() / scale.clamp(min=1e-30).unsqueeze(-1)).round().to(torch.int8), scale


def score_table(row: dict[str, Any]) -> pa.Table:
    """One response's row of scores, its columns as tensors (tokens, ...) -> a table of one row."""
    values = {
        name: _as_bytes(value) if name == "hidden" else value.flatten().numpy() if isinstance(value, Tensor) else value
        for name, value in row.items()
    }
    return pa.Table.from_pylist([values], SCHEMAS["scores"])


def _as_bytes(hidden: Tensor) -> bytes:
    return hidden.contiguous().view(torch.uint8).numpy().tobytes()


def save_head(head: Head, path: Path) -> None:
    """Only the rows of real tokens are kept."""
    tensors = {"weight": head.weight[: head.vocab_size].clone()}
    if head.bias is not None:
        tensors["bias"] = head.bias[: head.vocab_size].clone()
    facts = {"head": json.dumps({"logit_scale": head.logit_scale, "softcap": head.softcap})}  # one key: order is random
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, metadata=facts)


def head_shape(path: Path) -> Head:
    """Shape and dtype of a saved head, without its content; of no rows where none was saved."""
    if not path.exists():
        return Head(torch.empty(0, 0, device="meta"))
    with safe_open(path, framework="pt") as file:
        weight = file.get_slice("weight")
        return Head(torch.empty(weight.get_shape(), dtype=weight[:1].dtype, device="meta"))


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
class SignalDecoder:
    """Turns rows of one scores artifact back into tensors and signals."""

    signal: str
    k: int
    top_k: int
    head: Head | None
    """The teacher's, with the signals "hidden" and "hidden8"."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (*LIGHT_COLUMNS, *SIGNAL_COLUMNS[self.signal])

    def to(self, device: torch.device) -> "SignalDecoder":
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
        if self.head is None and objective.policy_gradient_weight:
            raise InputError(
                f"Scores with the signal {self.signal!r} do not hold the teacher's probability of every token.",
                "Score with --signal hidden.",
            )
        if self.head is None and objective.temperature != 1:
            raise InputError(
                f"Scores with the signal {self.signal!r} hold at temperature 1, not {objective.temperature}.",
                "Score with --signal hidden, or train at temperature 1.",
            )

    def tensors(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Rows of scores -> tensors over all their tokens, row after row."""
        flat = {name: _concat(rows, name) for name in self.columns if name != "hidden"}
        shapes = {"candidates": self.k, "ranks": self.k, "top_ids": self.top_k, "top_log_probs": self.top_k}
        tensors = {name: value.reshape(-1, shapes[name]) if name in shapes else value for name, value in flat.items()}
        if self.head is not None:
            dtype = torch.int8 if self.signal == "hidden8" else self.head.weight.dtype
            raw = torch.frombuffer(bytearray(b"".join(row["hidden"] for row in rows)), dtype=dtype)
            tensors["hidden"] = raw.reshape(-1, self.head.weight.shape[1])
        return tensors

    def decode(self, tensors: dict[str, Tensor]) -> TeacherSignal | TeacherHidden:
        """What `tensors` made (perhaps moved to another device) -> the teacher's signal."""
        if self.head is not None:
            hidden = tensors["hidden"]
            if self.signal == "hidden8":
                hidden = (hidden * tensors["hidden_scale"].unsqueeze(-1)).to(self.head.weight.dtype)
            return TeacherHidden(hidden, self.head)
        ranks = TeacherRanks(tensors["teacher_entropy"], tensors["candidates"], tensors["ranks"])
        if self.signal == "ranks":
            return ranks
        return TeacherTopK(ranks, tensors["top_ids"], tensors["top_log_probs"])


def _concat(rows: list[dict[str, Any]], name: str) -> Tensor:
    joined = np.concatenate([row[name] for row in rows])
    return torch.from_numpy(joined.astype(np.int64 if joined.dtype.kind == "i" else np.float32))
