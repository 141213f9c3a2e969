"""Teacher signals on disk: the saved head, the rounding of int8, and the bytes per token."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsdkd.artifacts.files import HEAD_FILE
from tsdkd.core import Head
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.signal_storage import (
    bytes_per_token,
    encode_signal,
    head_shape,
    load_head,
    save_head,
    to_int8,
)


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20))
def test_int8_is_at_most_half_a_step_off(row: list[float]) -> None:
    """A row's step is its largest magnitude over 127, and at least 1e-30; a row of zeros stays one."""
    hidden = torch.tensor([row])
    coded, scale = to_int8(hidden)
    step = max(map(abs, row)) / 127
    assert float((coded * scale.unsqueeze(-1) - hidden).abs().max()) <= step / 2 * 1.001 + 127e-30 * (step < 1e-30)


@pytest.mark.parametrize("bias", [False, True])
def test_a_saved_head_gives_the_same_logits_without_padding_rows(tmp_path: Path, bias: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 4, dtype=torch.bfloat16)
    head = Head(weight, bias=torch.randn(7).bfloat16() if bias else None, logit_scale=0.5, softcap=3.0, vocab_size=5)
    save_head(head, tmp_path / HEAD_FILE)
    loaded, hidden = load_head(tmp_path / HEAD_FILE), torch.randn(3, 4).bfloat16()
    assert loaded.weight.shape == (5, 4)
    assert torch.equal(loaded.logits(hidden), head.logits(hidden))
    shape = head_shape(tmp_path / HEAD_FILE)
    assert (shape.weight.shape, shape.weight.dtype) == ((5, 4), torch.bfloat16)
    assert len(head_shape(tmp_path / "missing").weight) == 0


@pytest.mark.parametrize("signal", ["hidden", "hidden8", "topk", "ranks"])
def test_bytes_per_token_count_the_encoded_columns(signal: str) -> None:
    """Beside the signal: four float32, k ids of 4 and ranks of 2 bytes; lossy signals add two float32."""
    config = ScoreConfig(k=4, signal=signal, top_k=3)
    hidden = torch.randn(2, 8)
    columns = encode_signal(hidden, hidden.log_softmax(-1), config)
    itemsize = {"top_ids": 4}  # stored as int32
    encoded = sum(value[0].numel() * itemsize.get(name, value.element_size()) for name, value in columns.items())
    other = 4 * 4 + 4 * (4 + 2) + (8 if signal in {"hidden8", "topk"} else 0)
    assert bytes_per_token(config, 8, torch.float32) == encoded + other
