"""GKD: generalised Jensen-Shannon divergence at every token.

Source: Agarwal et al., ICLR 2024, eq. (1) and Algorithm 1.
Data: scores of any responses, or a loaded teacher. The student responds to a fraction lambda of the prompts: online
with `--lambda` and `--rollouts` for the others, offline with `generate --policy mixed`.
Loss: `JSD(beta) = beta KL(p || m) + (1 - beta) KL(q || m)`, `m = beta p + (1 - beta) q`. The paper tries beta 0.1, 0.5
and 0.9; the default is 0.5, as in TRL.

Differences from the paper: lambda is drawn per prompt, and the paper draws it per batch; the loss is the mean over a
response's tokens, then over responses; it has no reward term.
"""

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.methods.method import DIVERGENCE_ONLY, Method

METHOD = Method(
    name="gkd",
    full_name="GKD (Agarwal et al., ICLR 2024)",
    description="generalised Jensen-Shannon divergence from the teacher at every token",
    objective=TSDKDConfig(beta=0.5, **DIVERGENCE_ONLY),
    objective_options=("beta", "temperature"),
)
