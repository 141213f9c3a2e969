"""Skew KL at every token: the loss of DistiLLM, without the schedule that `distillm` adds.

Source: Ko et al., ICML 2024.
Data: scores of any responses, or a loaded teacher.
Loss: `1/L sum_t KL(p || skew p + (1 - skew) q)`, skew 0.1, p the teacher, q the student.

Differences from the paper: the loss is the mean over a response's tokens, then over responses; it has no
language-modelling term. The authors' code leaves out the teacher's entropy, a constant.
"""

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.methods.method import DIVERGENCE_ONLY, Method

METHOD = Method(
    name="skew-kl",
    full_name="skew KL (Ko et al., ICML 2024)",
    description="KL from the teacher to a mixture of teacher and student at every token",
    objective=TSDKDConfig(divergence="skew-kl", **DIVERGENCE_ONLY),
    objective_options=("skew", "temperature"),
)
