"""Model families: logits computed from hidden states equal the model's own, or the model is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.families import FAMILIES, tiny
from tsdkd.errors import InputError
from tsdkd.stages.models.load import load_model


def sequences() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of three sequences of different lengths, padded on the right."""
    mask = torch.arange(12) < torch.tensor([[12], [7], [3]])
    return torch.randint(258, (3, 12), generator=torch.Generator().manual_seed(1)) * mask, mask.long()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_from_hidden_states_are_the_models_own(family: str, dtype: torch.dtype) -> None:
    """With softcaps, scales, embedding multipliers and biases."""
    language_model = tiny(family, dtype)
    ids, mask = sequences()
    with torch.no_grad():
        expected = language_model.model(input_ids=ids, attention_mask=mask).logits[..., :258].float()
        logits = language_model.head.logits(language_model.hidden(ids, mask)).float()
    assert float(expected[mask.bool()].std()) > 0.01
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    torch.testing.assert_close(
        logits[mask.bool()], expected[mask.bool()], rtol=tolerance, atol=tolerance * float(expected.max())
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_do_not_depend_on_the_batch(family: str) -> None:
    """A short sequence has the same hidden states alone and beside longer ones."""
    language_model = tiny(family)
    ids, mask = sequences()
    with torch.no_grad():
        batched = language_model.hidden(ids, mask)
        for row, length in enumerate(mask.sum(-1).tolist()):
            alone = language_model.hidden(ids[row : row + 1, :length], mask[row : row + 1, :length])
            torch.testing.assert_close(batched[row, :length], alone[0], rtol=1e-4, atol=1e-5)


def hook(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda _module, _inputs, output: change(output)


def test_a_head_of_several_layers_is_refused() -> None:
    """Its `get_decoder` returns a part of the head."""
    model = tiny("modernbert-decoder", cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)
    assert model.hidden(*sequences()).shape == (3, 12, 32)
    with pytest.raises(InputError, match="transforms its logits"):
        _ = model.head


@pytest.mark.parametrize(
    "change",
    [torch.square, lambda z: 30 * torch.tanh(z / 30), lambda z: 1.001 * z, lambda z: z + 0.01, lambda z: z.roll(1, -1)],
    ids=["square", "cap at 30", "scale 1.001", "shift", "permutation"],
)
def test_an_unsupported_change_of_the_logits_is_refused(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Even though the model's ordinary logits are below 1, where a softcap hardly changes them."""
    language_model = tiny("llama", initializer_range=0.02)
    language_model.model.lm_head.register_forward_hook(hook(change))
    with pytest.raises(InputError, match="transforms its logits"):
        language_model.head  # noqa: B018


def test_an_unsupported_change_before_the_head_is_refused() -> None:
    language_model = tiny("llama")
    language_model.model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] / 2,))
    with pytest.raises(InputError, match="transforms its logits"):
        language_model.head  # noqa: B018


@pytest.mark.parametrize("more", [{"lm_head_multiplier": 0.5}, {}])
def test_an_unsupported_multiplier_is_refused(more: dict[str, float]) -> None:
    """Falcon-H1 multiplies logits by `lm_head_multiplier`, which no other family does."""
    language_model = tiny("falcon_h1", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, **more)
    if more:
        with pytest.raises(InputError, match="transforms its logits"):
            language_model.head  # noqa: B018
    else:
        assert language_model.head.logit_scale == 1


@pytest.mark.parametrize("family", ["rwkv", "recurrent_gemma"])
def test_a_model_that_reads_padding_is_refused(family: str, tmp_path: Path) -> None:
    """Its responses would depend on the lengths of the other prompts in the batch."""
    language_model = tiny(family)
    language_model.model.save_pretrained(tmp_path)
    language_model.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="reads padding"):
        load_model(str(tmp_path))
