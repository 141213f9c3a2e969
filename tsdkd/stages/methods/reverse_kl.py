"""Reverse KL at every token: GKD with beta = 1, and the single-step part of MiniLLM's gradient.

Source: Agarwal et al., ICLR 2024; Gu et al., ICLR 2024, eq. (3), whose remaining part `minillm` adds.
Data: scores of any responses, or a loaded teacher; the papers use the student's responses.
Loss: `1/L sum_t KL(q || p)`, q the student, p the teacher.
"""

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.methods.method import DIVERGENCE_ONLY, Method

METHOD = Method(
    name="reverse-kl",
    full_name="reverse KL, token by token (as in Agarwal et al., ICLR 2024)",
    description="KL from the student to the teacher at every token",
    objective=TSDKDConfig(beta=1.0, **DIVERGENCE_ONLY),
    objective_options=("temperature",),
)
