"""The engine check, on made-up distributions: it accepts rounding and names the likely cause of a mismatch."""

from collections.abc import Callable

import pytest
import torch

from tsdkd.stages.engines.engine_check import SAMPLING_REMEDY, WEIGHTS_REMEDY, diagnose_mismatch
from tsdkd.stages.engines.vllm_process import EngineOutput

TOLERANCE = 0.05
RESPONSES, TOKENS, VOCAB = 4, 24, 50


def logits(seed: int, spread: float = 2.0) -> torch.Tensor:
    """Random logits (response, token, vocab)."""
    return spread * torch.randn(RESPONSES, TOKENS, VOCAB, generator=torch.Generator().manual_seed(seed))


def outputs_of(engine_logits: torch.Tensor) -> list[EngineOutput]:
    """Tokens sampled from logits, with their log-probabilities."""
    generator = torch.Generator().manual_seed(9)
    outputs = []
    for response_logits in engine_logits:
        log_probs = response_logits.log_softmax(-1)
        ids = log_probs.exp().multinomial(1, generator=generator)
        outputs.append(
            EngineOutput([1, 2], ids.flatten().tolist(), log_probs.gather(-1, ids).flatten().tolist(), False)
        )
    return outputs


def best_k(values: torch.Tensor, k: int) -> torch.Tensor:
    return values.masked_fill(values < values.topk(k, -1).values[..., -1:], -torch.inf)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_rounding_is_agreement(temperature: float) -> None:
    """Logits differ by 0.05 nats; a low temperature enlarges the difference."""
    reference = logits(0, 1.0)
    engine = (reference + 0.05 * logits(1, 1.0)) / temperature
    assert diagnose_mismatch(list(reference), outputs_of(engine), temperature, 1.0, TOLERANCE) is None


def test_a_configured_top_p_is_agreement() -> None:
    reference = logits(0)
    ordered = reference.sort(descending=True, dim=-1)
    inside = ordered.values.softmax(-1).cumsum(-1) - ordered.values.softmax(-1) < 0.8
    cut = torch.full_like(reference, -torch.inf).scatter(-1, ordered.indices, ordered.values.where(inside, -torch.inf))
    assert diagnose_mismatch(list(reference), outputs_of(cut), 1.0, 0.8, TOLERANCE) is None
    assert diagnose_mismatch(list(reference), outputs_of(cut), 1.0, 1.0, TOLERANCE) is not None


@pytest.mark.parametrize(
    ("transform", "temperature"),
    [
        (lambda z: z / 0.6, 0.6),
        (lambda z: z / 1.8, 1.8),
        (lambda z: best_k(z, 3), None),
        (lambda z: best_k(z, 1), None),
    ],
    ids=["colder", "warmer", "top-3", "greedy"],
)
def test_another_sampling_setting_is_not_taken_for_other_weights(
    transform: Callable[[torch.Tensor], torch.Tensor], temperature: float | None
) -> None:
    reference = logits(0)
    mismatch = diagnose_mismatch(list(reference), outputs_of(transform(reference)), 1.0, 1.0, TOLERANCE)
    assert mismatch is not None
    finding, remedy = mismatch
    assert remedy == SAMPLING_REMEDY
    if temperature is not None:
        assert float(finding.split()[-1]) == pytest.approx(temperature, rel=0.03)


@pytest.mark.parametrize("nats", [0.3, 1.0, 3.0])
def test_other_weights_are_recognised(nats: float) -> None:
    """Logits differ by so many nats: from a fine-tuned copy to an unrelated model."""
    reference = logits(0)
    mismatch = diagnose_mismatch(list(reference), outputs_of(reference + nats * logits(1, 1.0)), 1.0, 1.0, TOLERANCE)
    assert mismatch is not None
    assert mismatch[1] == WEIGHTS_REMEDY
