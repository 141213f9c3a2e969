"""Teacher signals on disk: how rows of scores encode them, how they are decoded, and their bytes per token."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tsdkd.artifacts.schemas import SIGNAL_COLUMNS, schema_of
from tsdkd.core import Head, TeacherHidden, TeacherRanks, TeacherSignal, TeacherTopK, TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.config.score import ScoreConfig

BASE_COLUMNS = ("student_entropy", "teacher_entropy", "student_log_prob", "teacher_log_prob", "candidates", "ranks")
SIGNALS_WITH_HEAD = {"hidden", "hidden8"}
LOSSY_SIGNALS = {"hidden8", "topk"}
"""Scores with these signals also record the exact divergence and the signal's."""


def bytes_per_token(config: ScoreConfig, width: int, dtype: torch.dtype) -> int:
    """Before compression. `width`: the teacher's hidden size; `dtype`: the precision of its head."""
    base = 4 * 4 + config.k * (4 + 2)
    divergences = 2 * 4 if config.signal in LOSSY_SIGNALS else 0
    signal = {"hidden": width * dtype.itemsize, "hidden8": width + 4, "topk": config.top_k * 8, "ranks": 0}
    return base + divergences + signal[config.signal]


def encode_signal(hidden: Tensor, log_p: Tensor, config: ScoreConfig) -> dict[str, Tensor]:
    """The teacher's hidden states (tokens, width) and log-probabilities (tokens, vocab) -> the signal's columns."""
    if config.signal == "hidden8":
        return dict(zip(("hidden", "hidden_scale"), to_int8(hidden), strict=True))
    if config.signal == "topk":
        top = log_p.topk(config.top_k, dim=-1)
        return {"top_ids": top.indices, "top_log_probs": top.values}
    return {"hidden": hidden} if config.signal == "hidden" else {}


def to_int8(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (tokens, width) -> int8 values (tokens, width) and the scale of each row (tokens,)."""
    scale = hidden.float().abs().amax(-1) / 127
    return (hidden.float() / scale.clamp(min=1e-30).unsqueeze(-1)).round().to(torch.int8), scale


def score_table(row: dict[str, Any]) -> pa.Table:
    """One row of scores, with tensors (tokens, ...) as columns -> a table of one row."""
    values = {
        name: _as_bytes(value) if name == "hidden" else value.flatten().numpy() if isinstance(value, Tensor) else value
        for name, value in row.items()
    }
    return pa.Table.from_pylist([values], schema_of("scores", values))


def _as_bytes(hidden: Tensor) -> bytes:
    return hidden.contiguous().view(torch.uint8).numpy().tobytes()


def save_head(head: Head, path: Path) -> None:
    """Saves a head without its padding rows."""
    tensors = {"weight": head.weight[: head.vocab_size].clone()}
    if head.bias is not None:
        tensors["bias"] = head.bias[: head.vocab_size].clone()
    # One key only: safetensors writes several in random order.
    metadata = {"head": json.dumps({"logit_scale": head.logit_scale, "softcap": head.softcap})}
    with TemporaryDirectory(dir=path.parent, suffix=".tmp") as directory:  # safetensors first writes another file there
        file = Path(directory) / path.name
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, file, metadata=metadata)
        file.replace(path)


def head_shape(path: Path) -> Head:
    """A saved head on the meta device, with shape and dtype only; without rows if the file does not exist."""
    if not path.exists():
        return Head(torch.empty(0, 0, device="meta"))
    with safe_open(path, framework="pt") as file:
        weight = file.get_slice("weight")
        return Head(torch.empty(weight.get_shape(), dtype=weight[:1].dtype, device="meta"))


def load_head(path: Path) -> Head:
    with safe_open(path, framework="pt") as file:
        settings = json.loads(file.metadata()["head"])
        return Head(
            weight=file.get_tensor("weight"),
            bias=file.get_tensor("bias") if "bias" in file.keys() else None,  # noqa: SIM118 - not a dict
            logit_scale=settings["logit_scale"],
            softcap=settings["softcap"],
            vocab_size=file.get_tensor("weight").shape[0],
        )


@dataclass(frozen=True, slots=True)
class SignalDecoder:
    """Decodes rows of a scores artifact to tensors and the teacher's signal."""

    signal: str
    k: int
    top_k: int
    head: Head | None
    """The teacher's head, for the signals "hidden" and "hidden8"."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (*BASE_COLUMNS, *SIGNAL_COLUMNS[self.signal])

    def to(self, device: torch.device) -> "SignalDecoder":
        return replace(self, head=None if self.head is None else self.head.to(device))

    def require_support(self, objective: TSDKDConfig, *, held_out: bool) -> None:
        """Raises InputError if an objective, or held-out measurement, needs more than the signal records."""
        max_k = self.head.weight.shape[0] - 1 if self.head is not None else self.k
        if objective.alpha and objective.k > max_k:
            remedy = "Lower --k." if self.head is not None else "Lower --k, or score again with a larger one."
            raise InputError(f"k is {objective.k}, but these scores allow only {max_k}.", remedy)
        if self.signal == "ranks" and objective.direct_weight:
            raise InputError(
                "Scores with the signal 'ranks' record no teacher distribution, which the direct term needs.",
                "Give --direct-weight 0, or score with --signal hidden or topk.",
            )
        if self.signal == "ranks" and held_out:
            raise InputError(
                "Scores with the signal 'ranks' record no teacher distribution, which --held-out needs.",
                "Leave out --held-out, or score with --signal hidden or topk.",
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
        """Rows of scores -> tensors (tokens, ...) of all their tokens, row after row."""
        flat = {name: _concatenate(rows, name) for name in self.columns if name != "hidden"}
        widths = {"candidates": self.k, "ranks": self.k, "top_ids": self.top_k, "top_log_probs": self.top_k}
        tensors = {name: value.reshape(-1, widths[name]) if name in widths else value for name, value in flat.items()}
        if self.head is not None:
            dtype = torch.int8 if self.signal == "hidden8" else self.head.weight.dtype
            hidden = torch.frombuffer(bytearray(b"".join(row["hidden"] for row in rows)), dtype=dtype)
            tensors["hidden"] = hidden.reshape(-1, self.head.weight.shape[1])
        return tensors

    def decode(self, tensors: dict[str, Tensor]) -> TeacherSignal:
        """The result of `tensors`, on any device -> the teacher's signal."""
        if self.head is not None:
            hidden = tensors["hidden"]
            if self.signal == "hidden8":
                hidden = (hidden * tensors["hidden_scale"].unsqueeze(-1)).to(self.head.weight.dtype)
            return TeacherHidden(hidden, self.head)
        ranks = TeacherRanks(tensors["teacher_entropy"], tensors["candidates"], tensors["ranks"])
        if self.signal == "ranks":
            return ranks
        return TeacherTopK(ranks, tensors["top_ids"], tensors["top_log_probs"])


def _concatenate(rows: list[dict[str, Any]], name: str) -> Tensor:
    values = np.concatenate([row[name] for row in rows])
    return torch.from_numpy(values.astype(np.int64 if values.dtype.kind == "i" else np.float32))
