"""Batches of samples: the response tokens, the hidden states that predict them, and drift since scoring."""

from typing import Any

import torch

from tsdkd.core import Head
from tsdkd.stages.data.source import ScoringSnapshot, collate, empty_batch, predicting_hidden, response_ids

SAMPLES = [{"prompt_ids": [5, 6, 7], "response_ids": [1]}, {"prompt_ids": [8], "response_ids": [2, 3]}]


class NothingRecorded:
    def recorded(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {}


def test_response_ids_and_the_positions_before_them() -> None:
    batch = collate(SAMPLES, NothingRecorded())  # type: ignore[arg-type]
    assert response_ids(batch["input_ids"], batch["response_mask"]).tolist() == [1, 2, 3]
    hidden = batch["input_ids"].unsqueeze(-1)  # each position's state is its own id
    assert predicting_hidden(hidden, batch["response_mask"]).flatten().tolist() == [7, 8, 2]


def test_an_empty_batch_has_no_response_token() -> None:
    assert empty_batch()["response_mask"].numel() == 0


def test_drift_and_candidate_overlap() -> None:
    """Logits are the hidden states: the first token's distribution changes, the second's does not."""
    head, before = Head(torch.eye(4)), torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3]])
    ids = torch.tensor([0, 3])
    log_probs = before.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    snapshot = ScoringSnapshot(ids, log_probs, before.topk(2).indices)
    unchanged = snapshot.compare(before, head)
    assert float(unchanged["candidate_overlap"]) == 1
    assert abs(float(unchanged["drift"])) < 1e-6
    now = torch.tensor([[0.0, 2, 3, 1], [0, 1, 2, 3]])  # proposes tokens 2 and 1 in place of 0 and 1
    changed = snapshot.compare(now, head)
    assert float(changed["candidate_overlap"]) == 0.75
    expected = (log_probs[0] - now[0].log_softmax(-1)[0]) / 2
    torch.testing.assert_close(changed["drift"], expected)
