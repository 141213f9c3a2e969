"""Teacher signals on disk: the saved head, the rounding of int8, and the bytes per token."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tsdkd.artifacts.files import HEAD_FILE
from tsdkd.artifacts.schemas import SIGNAL_COLUMNS
from tsdkd.core import Head, SeveralTeachers
from tsdkd.stages.config.score import ScoreConfig
from tsdkd.stages.data.signal_storage import (
    BASE_COLUMNS,
    SignalDecoder,
    bytes_per_token,
    encode_signal,
    head_shape,
    load_head,
    save_head,
    score_table,
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


@pytest.mark.parametrize("signal", ["hidden", "hidden8"])
@pytest.mark.parametrize("names", [["code", "math", "code"], ["math"]])
def test_the_rows_of_several_teachers_decode_as_each_alone(signal: str, names: list[str]) -> None:
    """Also where a teacher has no row; widths and precisions differ."""
    torch.manual_seed(0)
    heads = {"code": Head(torch.randn(7, 4).bfloat16()), "math": Head(torch.randn(7, 6), softcap=2.0)}
    rows = [_row(heads[name], tokens, signal) | {"teacher": name} for tokens, name in enumerate(names, 1)]
    decoder = SignalDecoder(signal, 3, 2, heads)
    several, student = decoder.decode(decoder.tensors(rows)), torch.randn(sum(range(len(names) + 1)), 7)
    assert isinstance(several, SeveralTeachers)
    assert len(several) == len(student)
    alone = [SignalDecoder(signal, 3, 2, {"": heads[row["teacher"]]}) for row in rows]
    signals = [one.decode(one.tensors([row])) for one, row in zip(alone, rows, strict=True)]
    assert torch.equal(several.entropy(1), torch.cat([one.entropy(1) for one in signals]))
    rankings = [
        one.ranked_candidates(own, 3) for one, own in zip(signals, student.split([*map(len, signals)]), strict=True)
    ]
    assert torch.equal(several.ranked_candidates(student, 3), torch.cat(rankings))


def _row(head: Head, tokens: int, signal: str) -> dict[str, Any]:
    """A row of scores as it is read from disk, whose other columns decide nothing here."""
    hidden = torch.randn(tokens, head.weight.shape[1]).to(head.weight.dtype)
    columns = {name: torch.zeros(tokens) for name in BASE_COLUMNS[:4]}
    columns |= dict.fromkeys(BASE_COLUMNS[4:], torch.zeros(tokens, 3, dtype=torch.int32))
    columns |= encode_signal(hidden, torch.empty(0), ScoreConfig(signal=signal))
    table = score_table({"sample_id": "s"} | columns)
    values = {name: table[name][0] for name in (*BASE_COLUMNS, *SIGNAL_COLUMNS[signal])}
    return {name: value.as_py() if name == "hidden" else value.values.to_numpy() for name, value in values.items()}
