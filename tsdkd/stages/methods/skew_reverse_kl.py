"""Skew reverse KL of DistiLLM (Ko et al., ICML 2024) at every token: `KL(q || (1 - skew) p + skew q)`, skew 0.1.

Its loss alone; `distillm` adds its schedule. Needs a teacher's signal; responses by anybody.

Departs: the mean over a response's tokens, then over responses; no language-modelling term.
"""

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.methods.method import DIVERGENCE_ONLY, Method

METHOD = Method(
    name="skew-reverse-kl",
    title="skew reverse KL (Ko et al., ICML 2024)",
    means="KL from the student to a mixture of both at every token",
    objective=TSDKDConfig(divergence="skew-reverse-kl", **DIVERGENCE_ONLY),
    options=("skew", "temperature"),
)
