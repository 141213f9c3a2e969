"""MiniLLM (Gu et al., ICLR 2024): the gradient of the sequences' reverse KL, on tokens of a mixture of both models.

`1/L sum_t w_t [grad KL(q || p) - R_t grad log q(y_t)]`, R_t the mean log p/q of the tokens after t, w_t = q/p~ the
importance weight of p~ = a p + (1 - a) q_then, which y was sampled from: single-step decomposition, length
normalisation and teacher-mixed sampling, eq. (3) to (6) there. Needs the teacher's whole distribution and responses of
`generate --policy teacher-mixed` (a = 0.2 there) or of the student alone (a = 0), sampled at temperature 1. Live, both
models sample; where vLLM answers, the student alone (--teacher-fraction 0).

Departs: the mean over a response's tokens, then over responses; the mean in R is over the tokens that there are (eq. 6
counts one less); no PPO clipping, and no language-modelling term on a pretraining corpus (Sec. 2.3).
"""

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.methods.method import DIVERGENCE_ONLY, Method

METHOD = Method(
    name="minillm",
    title="MiniLLM (Gu et al., ICLR 2024)",
    means=(
        "KL from the student to the teacher at every token and, by policy gradient, in what each token leads to, on "
        "tokens sampled from a mixture of both"
    ),
    objective=TSDKDConfig(beta=1.0, policy_gradient_weight=1.0, **DIVERGENCE_ONLY),
    options=(),
    authors=("student", "mixture"),
    teacher_fraction=0.2,
)
