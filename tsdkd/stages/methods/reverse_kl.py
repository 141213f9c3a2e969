"""Reverse KL at every token, `1/L sum_t KL(q || p)`: GKD at beta = 1, and the single-step part of MiniLLM's gradient.

MiniLLM (Gu et al., ICLR 2024), eq. (3), splits the policy gradient of the sequences' reverse KL into this and a part
with the rewards to come, which `minillm` adds. Needs a teacher's signal; meant for the student's own responses, and
takes any.
"""

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.methods.method import DIVERGENCE_ONLY, Method

METHOD = Method(
    name="reverse-kl",
    title="reverse KL, token by token (as in Agarwal et al., ICLR 2024)",
    means="KL from the student to the teacher at every token",
    objective=TSDKDConfig(beta=1.0, **DIVERGENCE_ONLY),
    options=("temperature",),
)
