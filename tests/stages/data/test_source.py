"""Batches of samples: the response tokens, the hidden states that predict them, and drift since scoring."""

from typing import Any

import torch

from tsdkd.core import Head
from tsdkd.stages.data.batches import predicted_ids
from tsdkd.stages.data.source import ScoringSnapshot, collate, empty_batch

SAMPLES = [{"prompt_ids": [5, 6, 7], "response_ids": [1]}, {"prompt_ids": [8], "response_ids": [2, 3]}]


class NothingRecorded:
    def recorded(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {}


def test_response_ids_and_the_positions_before_them() -> None:
    batch = collate(SAMPLES, NothingRecorded())
    assert predicted_ids(batch).tolist() == [1, 2, 3]
    assert batch["input_ids"][batch["predicting"]].tolist() == [7, 8, 2]
    assert batch["response_mask"].tolist() == [[True, False], [True, True]]


def test_each_turn_of_a_mask_is_a_response() -> None:
    """The token 3 is context: it is read, and not learned."""
    conversation = {"prompt_ids": [5], "response_ids": [1, 2, 3, 4], "response_mask": [True, True, False, True]}
    batch = collate([conversation, SAMPLES[0]], NothingRecorded())
    assert batch["input_ids"].tolist() == [[5, 1, 2, 3, 4], [5, 6, 7, 1, 0]]
    assert predicted_ids(batch).tolist() == [1, 2, 4, 1]
    assert batch["input_ids"][batch["predicting"]].tolist() == [5, 1, 3, 7]
    assert batch["response_mask"].tolist() == [[True, True], [True, False], [True, False]]


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
