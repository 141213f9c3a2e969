"""Skew KL of DistiLLM (Ko et al., ICML 2024) at every token: `KL(p || skew p + (1 - skew) q)`, skew 0.1.

Its loss alone; `distillm` adds its schedule. Needs a teacher's signal; responses by anybody.

Departs: the mean over a response's tokens, then over responses; no language-modelling term. The authors' code leaves
out the teacher's entropy, a constant.
"""

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.methods.method import DIVERGENCE_ONLY, Method

METHOD = Method(
    name="skew-kl",
    title="skew KL (Ko et al., ICML 2024)",
    means="KL from the teacher to a mixture of both at every token",
    objective=TSDKDConfig(divergence="skew-kl", **DIVERGENCE_ONLY),
    options=("skew", "temperature"),
)
