"""FiRe-OPD: reverse KL without the responses that the teacher finds least likely, with a weight for each token.

Source: arXiv 2606.02684, eq. (4) to (8), as two public descriptions give them; the authors' code (YuYingLi0/FiRe-OPD
2e23cd6). The paper's text was not read.
Data: scores of any responses with a whole distribution, or a loaded teacher; the paper takes the student's responses.
Loss: `1/L sum_t w_t KL(q || p)`. w is proportional to `(1 + alpha (1 - H(p)/max H(p))) (1 + beta H(q)/max H(q))`, with
the maxima over the step's tokens, and has the mean 1 in each response; alpha = beta = 1. Then the mean over the
responses whose mean log p(y) is at least the step's quantile `dropped`, 0.2. Of two responses the quantile drops one.

Differences from the paper: KL(q || p) over the vocabulary replaces its policy gradient at the response's token, whose
expectation is the same gradient for given weights (the quantile and the mean of w depend on the response); no clipping
as in PPO.
Open in the paper: the scope of the maxima; one description takes them over the batch.
Difference from the code: its quantile, maxima and mean of w are those of a micro-batch with its dropped responses. Its
scripts have one response in each micro-batch, so none is dropped and the maxima are the response's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tsdkd.core.features import Features
from tsdkd.core.losses import Divergence
from tsdkd.core.selective_objective import Selected
from tsdkd.errors import InputError
from tsdkd.stages.methods.method import Method
from tsdkd.stages.methods.values import Options

if TYPE_CHECKING:
    from torch import Tensor

LEAST_ENTROPY = 1e-6


def select(features: Features, options: Options) -> Selected:
    if not 0 <= (dropped := options["dropped"]) < 1:
        raise InputError(f"The share of dropped responses is {dropped}.", "Choose a share in [0, 1).")
    for name in ("alpha", "beta"):
        if (value := options[name]) < 0:
            raise InputError(f"{name} is {value}.", "Choose 0 or more.")
    likelihood = features.teacher_log_prob.double().sum(-1, keepdim=True) / features.length
    kept = likelihood >= likelihood.quantile(dropped)
    confidence, confusion = 1 - _relative(features.teacher_entropy), _relative(features.student_entropy)
    weights = (1 + options["alpha"] * confidence) * (1 + options["beta"] * confusion)
    mean = features.mean(features.mask)
    weights = weights / (mean * weights).sum(-1, keepdim=True)
    return {"divergence": mean * weights * kept * (len(kept) / int(kept.sum()))}


def _relative(entropy: Tensor) -> Tensor:
    """The entropies divided by the greatest of them."""
    return entropy / entropy.max().clamp(min=LEAST_ENTROPY)


METHOD = Method(
    name="fire-opd",
    full_name="FiRe-OPD (arXiv 2606.02684)",
    description=(
        "KL from the student to the teacher on responses that the teacher finds likely, with greater weights where the "
        "teacher is certain and the student is not"
    ),
    losses={"divergence": Divergence.jsd(1)},
    select=select,
    features=("student_entropy", "teacher_entropy", "teacher_log_prob"),
    options={"alpha": 1.0, "beta": 1.0, "dropped": 0.2},
    scope="batch",
)
