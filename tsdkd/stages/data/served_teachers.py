"""The teachers of online training behind servers, which read each step; no weight of them is in memory."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from tsdkd.core.entropy_bounds import entropy_bounds, estimated_entropy
from tsdkd.core.recorded_signals import TeacherTopK, TopKRanks
from tsdkd.stages.data.batches import Batch
from tsdkd.stages.data.online_teachers import OnlineTeacher
from tsdkd.stages.data.rollout_teachers import TEACHER
from tsdkd.stages.data.served_scoring import read_request, require_captured_mass
from tsdkd.stages.data.source import Sample
from tsdkd.stages.teacher_server.reading import Reading, ReadRequest
from tsdkd.stages.teacher_server.server import TeacherServer

READING = "teacher_reading"
"""The key of a sample's reading by its own teacher."""


@dataclass(frozen=True, slots=True)
class ServedTeachers(OnlineTeacher):
    """Served teachers; each reads its own samples of an optimizer step once, all at the same time."""

    servers: Mapping[str, TeacherServer]
    """By the teachers' names; "" without names."""
    vocab: int
    """Ids that the student knows."""

    def read_ahead(self, samples: list[Sample]) -> list[Sample]:
        """Raises TsdkdError where a server fails, or its K tokens hold too little probability."""
        owners = [sample.get(TEACHER) or "" for sample in samples]

        def read(name: str) -> list[Reading]:
            own = [sample for sample, owner in zip(samples, owners, strict=True) if owner == name]
            return read_by(self.servers[name], list(map(read_request, own)), name)

        names = sorted(set(owners))
        with ThreadPoolExecutor(len(self.servers)) as threads:
            try:
                readings = {name: iter(found) for name, found in zip(names, threads.map(read, names), strict=True)}
            except BaseException:  # an interrupt does not wait for answers
                for server in self.servers.values():
                    server.close()
                raise
        return [sample | {READING: next(readings[owner])} for sample, owner in zip(samples, owners, strict=True)]

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
