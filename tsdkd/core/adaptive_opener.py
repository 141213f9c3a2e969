"""The adaptive opener (A.7, Algorithm 2): the more uncertain the student is than its teacher, the longer the opener.

It loads without torch, for pages that show recorded entropies.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FRACTIONS = (0.05, 0.10, 0.15, 0.20)
"""The fraction c for the smoothed uncertainty C in [0, .25), [.25, .5), [.5, .75), [.75, 1]."""
WINDOW = 5
"""Responses that C is averaged over: the current one and the ones before it."""


class AdaptiveOpener:
    """Chooses the fraction c of each response from the entropy gap, smoothed over the last `window` responses.

    It keeps state: pass each response once, in order; `state_dict` and `load_state_dict` carry the state across a
    resume.
    """

    def __init__(self, window: int = WINDOW) -> None:
        self._recent: deque[float] = deque(maxlen=window)

    def fraction(self, student_entropy: Tensor, teacher_entropy: Tensor, response_mask: Tensor) -> Tensor:
        """Entropies and mask (batch, seq) -> c (batch,). Raises InputError for a row without a response token."""
        import torch

        from tsdkd.core.selection import check_rows

        check_rows(response_mask)
        gap = torch.where(response_mask, student_entropy.detach() - teacher_entropy.detach(), 0.0).sum(-1)
        fractions = self.update(torch.sigmoid(gap / response_mask.sum(-1)).tolist())
        return torch.tensor(fractions, dtype=torch.float64, device=student_entropy.device)

    def update(self, uncertainties: list[float]) -> list[float]:
        """The unsmoothed C of the next responses, in order -> the fraction of each."""
        return [self._update(uncertainty) for uncertainty in uncertainties]

    def _update(self, uncertainty: float) -> float:
        self._recent.append(uncertainty)
        smoothed = sum(self._recent) / len(self._recent)
        return FRACTIONS[min(int(smoothed * 4), 3)]

    def state_dict(self) -> dict[str, Any]:
        return {"window": self._recent.maxlen, "recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._recent = deque(state["recent"], maxlen=state["window"])
