"""The teacher of online training behind a server, which reads each batch; no weight of it is in memory."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tsdkd.core.entropy_bounds import entropy_bounds, estimated_entropy
from tsdkd.core.recorded_signals import TeacherTopK, TopKRanks
from tsdkd.stages.data.batches import Batch
from tsdkd.stages.data.served_scoring import require_captured_mass
from tsdkd.stages.teacher_server.reading import ReadRequest
from tsdkd.stages.teacher_server.server import TeacherServer


@dataclass(frozen=True, slots=True)
class ServedTeacher:
    """A `UnloadedTeacher`, whose signal is its top K."""

    server: TeacherServer
    vocab: int
    """Ids that the student knows."""
    end_ids: list[int] = field(default_factory=list)

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
    """The sequences of a batch, and the tokens that its predicting positions predict."""
    requests = []
    for ids, mask, predicting in zip(*(batch[n] for n in ("input_ids", "attention_mask", "predicting")), strict=True):
        positions = (predicting.nonzero().squeeze(-1) + 1).tolist()
        requests.append(ReadRequest(ids[mask.bool()].tolist(), positions))
    return requests
