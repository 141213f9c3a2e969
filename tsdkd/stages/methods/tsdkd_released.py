"""TSD-KD as its released code computes it, to compare with the paper and to reproduce its numbers.

Source: github.com/kmswin1/TSD-KD, commit 86477d4.
Data: as for tsdkd.
Loss: tsdkd's with three deviations of the code. The indirect term is the likelihood of the reversed ranking; the
entropy term covers the upper 90 % of the tokens; one opener is cut for the whole micro-batch. The last two average over
the micro-batch's tokens, so the update depends on the micro-batches, as it does in the code.

Differences from the code: padding never counts (in the code, its entropies can pass the quantile); the divergence is
averaged per response; the end token, the prompt's attention and the student's embedding follow tsdkd (docs/fidelity.md,
points 4 and 5).
"""

from dataclasses import replace

from tsdkd.core.config import RELEASED
from tsdkd.stages.methods.method import Method
from tsdkd.stages.methods.tsdkd import METHOD as TSDKD

METHOD = Method(
    name="tsdkd-released",
    full_name="TSD-KD as its code was released",
    description="with the reversed ranking, the entropy term on 90 % of the tokens, and one opener per micro-batch",
    objective=replace(TSDKD.objective, released=RELEASED),
    objective_options=tuple(name for name in TSDKD.objective_options if name != "released"),
)
