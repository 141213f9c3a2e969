"""Supervised KD: forward KL to the teacher at every token of the teacher's responses (Hinton et al. 2015; Sanh 2019).

`1/L sum_t KL(p || q)`, y by the teacher, the name and the form as in GKD (Agarwal et al. 2024, eq. 2). Needs a
teacher's signal on rollouts of `generate --policy teacher`.

Departs: the mean over a response's tokens, then over responses; no term on ground-truth answers.
"""

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.methods.method import DIVERGENCE_ONLY, Method

METHOD = Method(
    name="supervised-kd",
    title="supervised distillation (as in Agarwal et al., ICLR 2024)",
    means="forward KL at every token of the teacher's own responses",
    objective=TSDKDConfig(beta=0.0, **DIVERGENCE_ONLY),
    options=("temperature",),
    authors=("teacher",),
    fresh=False,
)
