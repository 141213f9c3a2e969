"""TIP: reverse KL at the tokens where the student is uncertain, or the models disagree (Soft-OR).

Source: arXiv 2604.14084 v4, eq. (2), (3), (7) to (9) and Sec. 6; the authors' code has no selection.
Data: scores of any responses with a distribution, or a loaded teacher; the paper takes the student's responses.
Loss: KL(q || p), its mean over the `floor(share L)` tokens of a response with the greatest `1 - (1 - h)(1 - d)`, then
over responses; share 0.5. h is the student's entropy, d is KL(q || p), both scaled to [0, 1] by the least and the
greatest value of the step's tokens; entropies above their 98 % quantile are cut to it first.

Open in the paper, chosen here: a response of fewer than 1/share tokens counts with one; the quantile is interpolated
linearly; values that are all equal become 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tsdkd.core.config import ROUNDING
from tsdkd.core.features import Features
from tsdkd.core.losses import Divergence
from tsdkd.core.selective_objective import Selected
from tsdkd.errors import InputError
from tsdkd.stages.methods.method import Method
from tsdkd.stages.methods.values import Options

if TYPE_CHECKING:
    from torch import Tensor


def select(features: Features, options: Options) -> Selected:
    if not 0 < (share := options["share"]) <= 1:
        raise InputError(f"The share of tokens is {share}.", "Choose a share in (0, 1].")
    if not 0 < (quantile := options["quantile"]) <= 1:
        raise InputError(f"The quantile of the entropies is {quantile}.", "Choose a quantile in (0, 1].")
    mask, entropy = features.mask, features.student_entropy
    entropy = entropy.clamp(max=entropy[mask].quantile(quantile))
    score = 1 - (1 - _scaled(entropy, mask)) * (1 - _scaled(features.reverse_kl, mask))
    count = (features.length.double() * share * (1 + ROUNDING)).floor().clamp(min=1)
    return {"divergence": features.mean(features.ranks(score) < count)}


def _scaled(values: Tensor, mask: Tensor) -> Tensor:
    """The values (batch, seq), of which the least and the greatest of the mask's become 0 and 1."""
    least, greatest = values[mask].aminmax()
    extent = greatest - least
    return (values - least) / extent if extent > 0 else values * 0


METHOD = Method(
    name="tip",
    full_name="TIP (arXiv 2604.14084)",
    description="KL from the student to the teacher where the student is uncertain or both disagree",
    losses={"divergence": Divergence.jsd(1)},
    select=select,
    features=("student_entropy", "reverse_kl"),
    options={"share": 0.5, "quantile": 0.98},
    scope="batch",
)
