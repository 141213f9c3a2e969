"""Speculative KD (Xu et al., ICLR 2025): a divergence at every token of responses that both models wrote together.

The student proposes each token, the teacher replaces those that are not among its best 25 (`generate --policy
speculative`); on the result `1/L sum_t D(p || q)`, D of GKD's family, forward KL by default. Needs a teacher's signal.

K = 25 and forward KL are those of the authors' code (google-research, speculative_kd, config/kd_train.yaml).

Departs: responses are written once and not during training, so in rounds at most; the teacher's replacement is among
its best K, not any of its tokens (Algorithm 1 there); the mean over a response's tokens, then over responses.
"""

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.methods.method import DIVERGENCE_ONLY, Method

METHOD = Method(
    name="skd",
    title="speculative distillation (Xu et al., ICLR 2025)",
    means="a divergence at every token of responses that the student proposed and the teacher mended",
    objective=TSDKDConfig(beta=0.0, **DIVERGENCE_ONLY),
    options=("beta", "temperature"),
    authors=("both",),
    fresh=False,
)
