"""Teacher signals on disk: how rows of scores encode them, how they are decoded, and their bytes per token."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
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
from tsdkd.core import (
    Head,
    SelectiveObjective,
    SeveralTeachers,
    TeacherHidden,
    TeacherRanks,
    TeacherSignal,
    TeacherTopK,
    TSDKDConfig,
)
from tsdkd.core.losses import SignalName
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
    heads: Mapping[str, Head]
    """The head of each teacher by name, for the signals "hidden" and "hidden8"; an only teacher has the name ""."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (*BASE_COLUMNS, *SIGNAL_COLUMNS[self.signal])

    @property
    def vocab(self) -> int | None:
        """The number of ids that the heads compare; None without heads."""
        return min((head.vocab for head in self.heads.values()), default=None)

    def to(self, device: torch.device) -> "SignalDecoder":
        return replace(self, heads={name: head.to(device).aligned for name, head in self.heads.items()})

    def require_support(self, objective: TSDKDConfig | SelectiveObjective, *, held_out: bool) -> None:
        """Raises InputError if an objective, or held-out measurement, needs more than the signal records."""
        if self.signal == "ranks" and held_out:
            raise InputError(
                "Scores with the signal 'ranks' record no teacher distribution, which --held-out needs.",
                "Leave out --held-out, or score with --signal hidden or topk.",
            )
        if isinstance(objective, SelectiveObjective):
            known: dict[str, SignalName] = {"ranks": "ranks", "topk": "topk"}
            most = (inf, inf) if self.heads else (self.k, self.top_k)
            objective.require_signal(known.get(self.signal, "hidden"), *most)
        else:
            self._require_config_support(objective)

    def require_temperature_1(self, temperature: float | str) -> None:
        """Raises InputError if probabilities at another temperature are not known."""
        if not self.heads and temperature != 1:
            raise InputError(
                f"Scores with the signal {self.signal!r} hold at temperature 1, not {temperature}.",
                "Score with --signal hidden, or train at temperature 1.",
            )

    def _require_config_support(self, objective: TSDKDConfig) -> None:
        max_k = self.k if self.vocab is None else self.vocab - 1
        if objective.alpha and objective.k > max_k:
            remedy = "Lower --k, or score again with a larger one." if self.vocab is None else "Lower --k."
            raise InputError(f"k is {objective.k}, but these scores allow only {max_k}.", remedy)
        if self.signal == "ranks" and objective.direct_weight:
            raise InputError(
                "Scores with the signal 'ranks' record no teacher distribution, which the direct term needs.",
                "Give --direct-weight 0, or score with --signal hidden or topk.",
            )
        if not self.heads and objective.policy_gradient_weight:
            raise InputError(
                f"Scores with the signal {self.signal!r} do not hold the teacher's probability of every token.",
                "Score with --signal hidden.",
            )
        self.require_temperature_1(objective.temperature)

    def tensors(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Rows of scores -> tensors (tokens, ...) of all their tokens, row after row.

        Of several heads, each row names its "teacher"; "owners" (tokens,) is the index of each token's teacher, and
        "hidden-I" (tokens of teacher I, width) has its hidden states.
        """
        flat = {name: _concatenate(rows, name) for name in self.columns if name != "hidden"}
        widths = {"candidates": self.k, "ranks": self.k, "top_ids": self.top_k, "top_log_probs": self.top_k}
        tensors = {name: value.reshape(-1, widths[name]) if name in widths else value for name, value in flat.items()}
        if len(self.heads) == 1:
            return tensors | {"hidden": self._hidden(rows, *self.heads.values())}
        if self.heads:
            names = list(self.heads)
            owners = torch.tensor([names.index(row["teacher"]) for row in rows])
            tensors["owners"] = owners.repeat_interleave(torch.tensor([len(row["student_entropy"]) for row in rows]))
            for i, (name, head) in enumerate(self.heads.items()):
                tensors[f"hidden-{i}"] = self._hidden([row for row in rows if row["teacher"] == name], head)
        return tensors

    def _hidden(self, rows: list[dict[str, Any]], head: Head) -> Tensor:
        """The hidden states (tokens, width) of one teacher's rows."""
        dtype, content = torch.int8 if self.signal == "hidden8" else head.weight.dtype, bytearray()
        for row in rows:
            content += row["hidden"]
        hidden = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return hidden.reshape(-1, head.weight.shape[1])

    def decode(self, tensors: dict[str, Tensor]) -> TeacherSignal:
        """The result of `tensors`, on any device -> the teacher's signal, `SeveralTeachers` with several heads."""
        if len(self.heads) == 1:
            return self._teacher_hidden(tensors["hidden"], tensors.get("hidden_scale"), *self.heads.values())
        if self.heads:
            owners, scale = tensors["owners"], tensors.get("hidden_scale")
            teachers = [
                self._teacher_hidden(tensors[f"hidden-{i}"], None if scale is None else scale[owners == i], head)
                for i, head in enumerate(self.heads.values())
            ]
            return SeveralTeachers.of(teachers, owners)
        ranks = TeacherRanks(tensors["teacher_entropy"], tensors["candidates"], tensors["ranks"])
        if self.signal == "ranks":
            return ranks
        return TeacherTopK(ranks, tensors["top_ids"], tensors["top_log_probs"])

    def _teacher_hidden(self, hidden: Tensor, scale: Tensor | None, head: Head) -> TeacherHidden:
        """`scale` (tokens,): of the signal "hidden8"."""
        return TeacherHidden(hidden if scale is None else (hidden * scale.unsqueeze(-1)).to(head.weight.dtype), head)


def _concatenate(rows: list[dict[str, Any]], name: str) -> Tensor:
    values = np.concatenate([row[name] for row in rows])
    return torch.from_numpy(values.astype(np.int64 if values.dtype.kind == "i" else np.float32))
