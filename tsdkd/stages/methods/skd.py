"""Speculative KD: a divergence at every token of responses that student and teacher write together.

Source: Xu et al., ICLR 2025; K = 25 and forward KL are the settings of the authors' code (google-research,
speculative_kd, config/kd_train.yaml).
Data: scores of `generate --policy speculative`: the student proposes each token, and the teacher replaces a token that
is not among its K most likely.
Loss: `1/L sum_t D(p || q)`, D of GKD's family, forward KL by default.

Differences from the paper: responses are written before training, not during it; the teacher replaces a token by one of
its K most likely, and in Algorithm 1 by any token; the loss is the mean over a response's tokens, then over responses.
"""

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.methods.method import DIVERGENCE_ONLY, Method

METHOD = Method(
    name="skd",
    full_name="speculative distillation (Xu et al., ICLR 2025)",
    description="a divergence at every token of responses that the student proposed and the teacher corrected",
    objective=TSDKDConfig(beta=0.0, **DIVERGENCE_ONLY),
    objective_options=("beta", "temperature"),
    authors=("both",),
    online_responses=False,
)
