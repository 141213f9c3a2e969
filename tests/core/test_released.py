"""The released code's three deviations: each alone, and together as its loss, written out with Python numbers."""

import math

import pytest
import torch

from tests.helpers.batches import Batch, make, value_and_gradient
from tsdkd.core import TSDKDConfig, ranking_nll, select, tsdkd_loss
from tsdkd.core.config import RELEASED
from tsdkd.core.ranking import plackett_luce_nll
from tsdkd.core.selection import released_entropy_mask, released_opener_mask
from tsdkd.errors import InputError


def entropies(logits: torch.Tensor) -> list[float]:
    return [-sum(x * math.log(x) for x in row) for row in logits.softmax(-1).tolist()]


def released_terms(batch: Batch, k: int, ratio: float) -> tuple[float, float]:
    """Indirect and entropy term: one opener length and one quantile for the batch, means over all of its tokens."""
    student, teacher, mask = batch
    rows = [entropies(student[i][mask[i]]) for i in range(len(mask))]
    flat = [h for row in rows for h in row]
    length, reached = 0, flat[0]
    while reached < ratio * sum(flat):
        length += 1
        reached += flat[length]
    losses = []
    for i, row in enumerate(rows):
        for t in range(min(length, len(row))):
            candidates = sorted(range(student.shape[-1]), key=lambda v: -float(student[i, t, v]))[:k]
            z = [float(student[i, t, v]) for v in sorted(candidates, key=lambda v: -float(teacher[i, t, v]))]
            losses.append(sum(math.log(sum(map(math.exp, z[: j + 1]))) - z[j] for j in range(k)))
    index = ratio * (len(flat) - 1)
    low, high = sorted(flat)[int(index)], sorted(flat)[int(index) + 1]
    uncertain = [h for h in flat if h >= low + (index - int(index)) * (high - low)]
    return sum(losses) / len(losses), sum(uncertain) / len(uncertain)


@pytest.mark.parametrize("lengths", [[12, 12, 12], [3, 14, 8], [30]])
def test_all_three_are_the_released_codes_terms(lengths: list[int]) -> None:
    batch = make(lengths)
    _, metrics = tsdkd_loss(*batch, TSDKDConfig(k=4, opener=0.2, em_ratio=0.2, released=RELEASED))
    indirect, entropy = released_terms(batch, 4, 0.2)
    assert metrics["indirect"].item() == pytest.approx(indirect)
    assert metrics["entropy"].item() == pytest.approx(entropy)


def test_two_tokens_lower_the_one_the_teacher_prefers() -> None:
    """Student logits (2, 1), the teacher prefers the second: loss 0.3133, gradient (-0.2689, +0.2689)."""
    scores = torch.tensor([1.0, 2.0], requires_grad=True)  # in the teacher's order
    loss = plackett_luce_nll(scores, released=True)
    loss.backward()
    assert loss.item() == pytest.approx(0.3133, abs=1e-4)
    assert scores.grad.tolist() == pytest.approx([0.2689, -0.2689], abs=1e-4)


def test_the_released_ranking_is_the_papers_with_the_teachers_order_reversed() -> None:
    student, teacher, mask = make([9])
    config = TSDKDConfig(k=4, opener=1.0, direct_weight=0, em_weight=0, released=("ranking",))
    loss, metrics = tsdkd_loss(student, teacher, mask, config)
    assert loss.item() == pytest.approx(0.1 * ranking_nll(student, -teacher, 4).mean().item())
    _, paper = tsdkd_loss(student, teacher, mask, TSDKDConfig(k=4, opener=1.0))
    assert metrics["rank_agreement"].item() == paper["rank_agreement"].item()  # the metric does not change


def test_one_opener_for_all_rows_ends_before_the_token_that_reaches_the_fraction() -> None:
    """Nine entropies of 1, row after row: a third is reached by the third, so two come before it, in every row."""
    entropy = torch.ones(3, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    assert released_opener_mask(entropy, mask, 3 / 9).sum(-1).tolist() == [2, 2, 1]
    assert not released_opener_mask(entropy, mask, 0.1).any()
    entropy[2, 1:] = 99  # padding
    entropy[0, 0] = 3  # 3 of 11
    assert released_opener_mask(entropy, mask, 0.3).sum(-1).tolist() == [1, 1, 1]
    assert released_opener_mask(entropy.flip(0), mask.flip(0), 0.3).sum(-1).tolist() == [1, 3, 3]


def test_ninety_percent_of_the_batch_are_uncertain() -> None:
    entropy = torch.arange(1.0, 21.0).reshape(2, 10)
    mask = torch.ones(2, 10, dtype=torch.bool)
    assert released_entropy_mask(entropy, mask, 0.1).sum(-1).tolist() == [8, 10]  # the quantile is 2.9
    mask[0, :5] = False
    assert released_entropy_mask(entropy, mask, 0.1).sum(-1).tolist() == [3, 10]  # 7.4


def test_the_means_are_over_the_batch() -> None:
    """A response's weights are those of its tokens among all responses'."""
    entropy = torch.tensor([[2.0, 2.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    config = TSDKDConfig(opener=0.4, em_ratio=0.5, released=RELEASED)
    mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    weights = select(entropy, entropy, mask, config)
    assert weights.indirect.tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]  # one token comes before 2.8 of 7
    assert weights.entropy.sum(-1).tolist() == pytest.approx([8 / 5, 2 / 5])  # the median is 1: all five


def test_an_empty_opener_ranks_nothing() -> None:
    loss, metrics = tsdkd_loss(
        *make([5]), TSDKDConfig(k=4, opener=1e-6, direct_weight=0, em_weight=0, released=RELEASED)
    )
    assert loss.item() == metrics["indirect"].item() == 0
    assert "rank_agreement" not in metrics


@pytest.mark.parametrize("deviation", RELEASED)
def test_each_deviation_changes_one_term(deviation: str) -> None:
    """It changes one term and leaves the others."""
    term = {"ranking": "indirect", "opener": "indirect", "entropy": "entropy"}[deviation]
    batch = make([12, 7])
    _, paper = tsdkd_loss(*batch, TSDKDConfig(k=4))
    _, metrics = tsdkd_loss(*batch, TSDKDConfig(k=4, released=(deviation,)))
    changed = {name for name in ("indirect", "direct", "entropy") if metrics[name] != paper[name]}
    assert changed == {term}


def test_the_released_gradient_lowers_the_teachers_most_likely_candidate() -> None:
    """A step against the released gradient lowers the logit of the teacher's first candidate; the paper's raises it."""
    student, teacher, mask = make([6])
    config = {"k": 4, "opener": 1.0, "direct_weight": 0, "em_weight": 0}
    ids = student.topk(4).indices
    best = ids.gather(-1, teacher.gather(-1, ids).argmax(-1, keepdim=True))
    for released, sign in (((), -1), (("ranking",), 1)):
        _, gradient = value_and_gradient((student, teacher, mask), TSDKDConfig(released=released, **config))
        assert (sign * gradient.gather(-1, best) > 0).all()


def test_the_released_opener_is_not_adaptive() -> None:
    with pytest.raises(InputError, match="one for all responses"):
        TSDKDConfig(opener="adaptive", released=("opener",))
    with pytest.raises(InputError, match="one for all responses"):
        tsdkd_loss(*make([5]), TSDKDConfig(k=4, released=RELEASED), torch.tensor([0.5]))
