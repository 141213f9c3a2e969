"""MiniLLM: the policy gradient of the sequences' reverse KL, on tokens that both models sample.

Source: Gu et al., ICLR 2024, eq. (3) to (6): single-step decomposition, length normalisation, teacher-mixed sampling.
Data: responses of `generate --policy teacher-mixed` (a = 0.2) or of the student alone (a = 0), sampled at temperature
1, with the teacher's whole distribution. Online, both models sample with transformers; vLLM samples from the student
alone (--teacher-fraction 0).
Gradient: `1/L sum_t w_t [grad KL(q || p) - R_t grad log q(y_t)]`. R_t is the mean of log p/q over the tokens after t.
w_t = q/p~ is the importance weight of p~ = a p + (1 - a) q_then, which y was sampled from.

Differences from the paper: the loss is the mean over a response's tokens, then over responses; R divides by the number
of later tokens, and eq. (6) by one less; no clipping as in PPO, and no language-modelling term on a pretraining corpus
(Sec. 2.3).
"""

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.methods.method import DIVERGENCE_ONLY, Method

METHOD = Method(
    name="minillm",
    full_name="MiniLLM (Gu et al., ICLR 2024)",
    description=(
        "KL from the student to the teacher at every token and, by policy gradient, at the tokens that follow it, on "
        "tokens sampled from a mixture of both"
    ),
    objective=TSDKDConfig(beta=1.0, policy_gradient_weight=1.0, **DIVERGENCE_ONLY),
    objective_options=(),
    authors=("student", "mixture"),
    teacher_fraction=0.2,
)
