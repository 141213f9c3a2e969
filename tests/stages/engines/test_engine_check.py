"""The canary's judgement, on distributions made by hand: what was wrong is named by its usual cause."""

from collections.abc import Callable

import pytest
import torch

from tsdkd.stages.engines.engine_check import TEMPLATE, WEIGHTS, diagnose_difference
from tsdkd.stages.engines.vllm_engine import CheckedResponse

NOISE = 0.05
RESPONSES, TOKENS, VOCAB = 4, 24, 50


def logits(seed: int, spread: float = 2.0) -> torch.Tensor:
    """What a model says before every token."""
    return spread * torch.randn(RESPONSES, TOKENS, VOCAB, generator=torch.Generator().manual_seed(seed))


def sung(says: torch.Tensor) -> list[CheckedResponse]:
    """Sampled from logits, and told with their log-probabilities."""
    generator = torch.Generator().manual_seed(9)
    found = []
    for one in says:
        logprobs = one.log_softmax(-1)
        ids = logprobs.exp().multinomial(1, generator=generator)
        found.append(CheckedResponse([1, 2], ids.flatten().tolist(), logprobs.gather(-1, ids).flatten().tolist()))
    return found


def best(says: torch.Tensor, k: int) -> torch.Tensor:
    return says.masked_fill(says < says.topk(k, -1).values[..., -1:], -torch.inf)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_rounding_is_agreement(temperature: float) -> None:
    """Logits off by 0.05 nats: at a low temperature they weigh more."""
    reference = logits(0, 1.0)
    engine = (reference + 0.05 * logits(1, 1.0)) / temperature
    assert diagnose_difference(list(reference), sung(engine), temperature, 1.0, NOISE) is None


def test_a_nucleus_that_was_asked_for_is_agreement() -> None:
    reference = logits(0)
    ordered = reference.sort(descending=True, dim=-1)
    inside = ordered.values.softmax(-1).cumsum(-1) - ordered.values.softmax(-1) < 0.8
    cut = torch.full_like(reference, -torch.inf).scatter(-1, ordered.indices, ordered.values.where(inside, -torch.inf))
    assert diagnose_difference(list(reference), sung(cut), 1.0, 0.8, NOISE) is None
    assert diagnose_difference(list(reference), sung(cut), 1.0, 1.0, NOISE) is not None


@pytest.mark.parametrize(
    ("engine", "temperature"),
    [(lambda z: z / 0.6, 0.6), (lambda z: z / 1.8, 1.8), (lambda z: best(z, 3), None), (lambda z: best(z, 1), None)],
    ids=["colder", "warmer", "top-3", "greedy"],
)
def test_another_transform_is_told_from_other_weights(
    engine: Callable[[torch.Tensor], torch.Tensor], temperature: float | None
) -> None:
    reference = logits(0)
    found = diagnose_difference(list(reference), sung(engine(reference)), 1.0, 1.0, NOISE)
    assert found is not None
    assert found[1] == TEMPLATE
    if temperature is not None:
        assert float(found[0].split()[-1]) == pytest.approx(temperature, rel=0.03)


@pytest.mark.parametrize("apart", [0.3, 1.0, 3.0])
def test_other_weights(apart: float) -> None:
    """From a fine-tuned sibling to a stranger: a difference of so many nats in every logit."""
    reference = logits(0)
    found = diagnose_difference(list(reference), sung(reference + apart * logits(1, 1.0)), 1.0, 1.0, NOISE)
    assert found is not None
    assert found[1] == WEIGHTS
