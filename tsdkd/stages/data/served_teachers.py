"""The teachers of online training behind servers, which read each batch or step; no weight of them is in memory."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from tsdkd.core.entropy_bounds import entropy_bounds, estimated_entropy
from tsdkd.core.recorded_signals import TeacherTopK, TopKRanks
from tsdkd.stages.data.batches import Batch
from tsdkd.stages.data.online_teachers import OnlineTeacher
from tsdkd.stages.data.served_scoring import read_request, require_captured_mass
from tsdkd.stages.data.source import Sample
from tsdkd.stages.models.load import packed_lengths
from tsdkd.stages.teacher_server.reading import Reading, ReadRequest
from tsdkd.stages.teacher_server.server import TeacherServer

READING = "teacher_reading"
"""The key of a sample's reading by its own teacher."""


@dataclass(frozen=True, slots=True)
class ServedTeacher(OnlineTeacher):
    """A served teacher, which reads each micro-batch; its signal is its top K."""

    server: TeacherServer
    vocab: int
    """Ids that the student knows."""

    def signal(self, batch: Batch) -> TeacherTopK:
        """Raises TsdkdError where the server fails, or its K tokens hold too little probability."""
        columns = top_k_columns(read_by(self.server, batch_requests(batch)))
        return top_k_signal(columns, self.vocab, batch["input_ids"].device)


@dataclass(frozen=True, slots=True)
class ServedTeachers(OnlineTeacher):
    """Several served teachers; each reads its own samples of an optimizer step, all at the same time."""

    servers: Mapping[str, TeacherServer]
    """By the teachers' names."""
    vocab: int
    """Ids that the student knows."""

    def read_ahead(self, samples: list[Sample]) -> list[Sample]:
        """Raises as `ServedTeacher.signal`."""

        def read(name: str) -> list[Reading]:
            return read_by(self.servers[name], [read_request(s) for s in samples if s["teacher"] == name], name)

        names = sorted({sample["teacher"] for sample in samples})
        with ThreadPoolExecutor(len(self.servers)) as threads:
            readings = {name: iter(found) for name, found in zip(names, threads.map(read, names), strict=True)}
        return [sample | {READING: next(readings[sample["teacher"]])} for sample in samples]

    def recorded(self, samples: list[Sample]) -> dict[str, Tensor]:
        return top_k_columns([sample[READING] for sample in samples])

    def signal(self, batch: Batch) -> TeacherTopK:
        return top_k_signal(batch["recorded"], self.vocab, batch["input_ids"].device)


def read_by(server: TeacherServer, requests: list[ReadRequest], teacher: str = "") -> list[Reading]:
    """Raises TsdkdError where the server fails, or its K tokens hold too little probability."""
    readings = server.read(requests)
    require_captured_mass(readings, server.top_k, "--teacher-top-k", teacher)
    return readings


def top_k_columns(readings: list[Reading]) -> dict[str, Tensor]:
    """The top K of readings (tokens, K), one after the other."""
    return {name: torch.cat([getattr(reading, name) for reading in readings]) for name in ("top_ids", "top_log_probs")}


def top_k_signal(columns: Mapping[str, Tensor], vocab: int, device: torch.device) -> TeacherTopK:
    """The signal on a device, with entropies that are estimated from the top K. `vocab`: ids that the student knows."""
    entropies = estimated_entropy(*entropy_bounds(columns["top_log_probs"], vocab))
    on_device = [values.to(device) for values in (entropies, columns["top_ids"], columns["top_log_probs"])]
    return TeacherTopK(TopKRanks(*on_device), *on_device[1:])


def batch_requests(batch: Batch) -> list[ReadRequest]:
    """The sequences of a batch, padded or packed, and the tokens that its predicting positions predict."""
    ids, predicting, mask = (batch[name] for name in ("input_ids", "predicting", "attention_mask"))
    if mask is None:
        lengths = packed_lengths(batch["position_ids"])
        rows = zip(ids[0].split(lengths), predicting[0].split(lengths), strict=True)
    else:
        rows = zip(
            *([row[kept] for row, kept in zip(t, mask.bool(), strict=True)] for t in (ids, predicting)), strict=True
        )
    return [ReadRequest(row.tolist(), (at.nonzero().squeeze(-1) + 1).tolist()) for row, at in rows]
