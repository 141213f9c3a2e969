"""The fingerprint of a served teacher: thousandths of a nat, and the difference that rounding explains."""

import pytest
import torch

from tsdkd.stages.teacher_server.fingerprint import VALUES, difference, fingerprint, same_teacher

LOG_PROBS = -torch.linspace(0, 8, 40)


def test_a_fingerprint_holds_thousandths_of_a_nat() -> None:
    values = torch.tensor([0.0, -0.001, -1.0, *[-2.5] * (VALUES - 4), -70.0])
    assert fingerprint(values) == "0000" + "0001" + "03e8" + "09c4" * (VALUES - 4) + "ffff"
    chosen = LOG_PROBS[torch.linspace(0, 39, VALUES).long()]
    assert fingerprint(LOG_PROBS) == fingerprint(chosen)


@pytest.mark.parametrize(("apart", "same"), [(0.0, True), (0.09, True), (0.11, False), (1.0, False)])
def test_another_teacher_differs_by_more_than_rounding(apart: float, same: bool) -> None:
    """By the mean over the values: those of one direction do not offset those of the other."""
    signs = torch.tensor([1.0, -1.0]).repeat(VALUES // 2)
    first, second = (-4 + values for values in (torch.zeros(VALUES), apart * signs))
    assert difference(fingerprint(first), fingerprint(second)) == pytest.approx(apart, abs=1e-3)
    assert same_teacher(fingerprint(first), fingerprint(second)) == same
