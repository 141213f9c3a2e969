"""The teacher of online training behind a server, which reads each batch; no weight of it is in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tsdkd.core.entropy_bounds import entropy_bounds, estimated_entropy
from tsdkd.core.recorded_signals import TeacherTopK, TopKRanks
from tsdkd.stages.data.batches import Batch
from tsdkd.stages.data.served_scoring import require_captured_mass
from tsdkd.stages.models.load import packed_lengths
from tsdkd.stages.teacher_server.reading import ReadRequest
from tsdkd.stages.teacher_server.server import TeacherServer


@dataclass(frozen=True, slots=True)
class ServedTeacher:
    """A `UnloadedTeacher`, whose signal is its top K."""

    server: TeacherServer
    vocab: int
    """Ids that the student knows."""

    def signal(self, batch: Batch) -> TeacherTopK:
        """Raises TsdkdError where the server fails, or its K tokens hold too little probability."""
        device = batch["input_ids"].device
        readings = self.server.read(batch_requests(batch))
        require_captured_mass(readings, self.server.top_k)
        top_ids = torch.cat([reading.top_ids for reading in readings])
        top_log_probs = torch.cat([reading.top_log_probs for reading in readings])
        entropies = estimated_entropy(*entropy_bounds(top_log_probs, self.vocab))
        on_device: list[Tensor] = [values.to(device) for values in (entropies, top_ids, top_log_probs)]
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
