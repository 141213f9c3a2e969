"""Sequence-level KD (Kim and Rush, 2016): the student learns the teacher's responses by heart.

`-1/L sum_t log q(y_t)`, y by the teacher: eq. (9) there, with the teacher's distribution over sequences replaced by
what it answered. Needs rollouts of `generate --policy teacher`, and neither scores nor a teacher.

Departs: the paper answers by beam search, ours are samples (or greedy, with --temperature 0); and the mean over a
response's tokens, then over responses, is this project's, not the sum over tokens.
"""

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.methods.method import DIVERGENCE_ONLY, Method

METHOD = Method(
    name="seqkd",
    title="sequence-level distillation (Kim and Rush, 2016)",
    means="cross-entropy on the teacher's own responses",
    objective=TSDKDConfig(beta=0.0, **DIVERGENCE_ONLY),
    options=(),
    authors=("teacher",),
    fresh=False,
    teacher=False,
)
