"""GKD (Agarwal et al., ICLR 2024): generalised JSD at every token, a share lambda of the responses by the student.

`JSD(beta) = beta KL(p || m) + (1 - beta) KL(q || m)`, `m = beta p + (1 - beta) q`, eq. (1) and Algorithm 1 there. Needs
a teacher's signal; responses by anybody. Lambda: live, --lambda with --rollouts for the others' share; staged,
`generate --policy mixed`. The paper tries beta 0.1, 0.5 and 0.9; 0.5 is the default here, and TRL's.

Departs: lambda is drawn for each prompt, not for each batch; the mean over a response's tokens, then over responses; no
reward term.
"""

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.methods.method import DIVERGENCE_ONLY, Method

METHOD = Method(
    name="gkd",
    title="GKD (Agarwal et al., ICLR 2024)",
    means="generalised Jensen-Shannon divergence from the teacher at every token",
    objective=TSDKDConfig(beta=0.5, **DIVERGENCE_ONLY),
    options=("beta", "temperature"),
)
