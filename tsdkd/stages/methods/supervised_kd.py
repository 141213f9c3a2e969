"""Supervised KD: forward KL at every token of the teacher's responses.

Source: Hinton et al., 2015; Sanh et al., 2019; name and form as in GKD (Agarwal et al., ICLR 2024), eq. (2).
Data: scores of `generate --policy teacher`, or of the responses of a dataset, `generate --policy given`.
Loss: `1/L sum_t KL(p || q)`, p the teacher, q the student.

Differences from the paper: the loss is the mean over a response's tokens, then over responses; no term uses
ground-truth responses.
"""

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.methods.method import DIVERGENCE_ONLY, Method

METHOD = Method(
    name="supervised-kd",
    full_name="supervised distillation (as in Agarwal et al., ICLR 2024)",
    description="forward KL at every token of the teacher's responses, or of given ones",
    objective=TSDKDConfig(beta=0.0, **DIVERGENCE_ONLY),
    objective_options=("temperature",),
    authors=("teacher", "given"),
    online_responses=False,
)
