"""TSD-KD as its released code computes it: three deviations from the paper, to compare and to reproduce.

The ranking's likelihood is that of the reversed ranking, the entropy term falls on the upper 90 % of the tokens, and
one opener is cut for the whole micro-batch; the last two take their means over its tokens. So the update depends on the
micro-batches, as it did there. Needs what tsdkd needs. Source: github.com/kmswin1/TSD-KD, commit 86477d4.

Departs from the code: padding never counts (there its entropies can pass the quantile), the divergence is averaged by
response, and the end token, the prompt's attention and the student's embedding are ours (docs/fidelity.md, 4 and 5).
"""

from dataclasses import replace

from tsdkd.core.config import RELEASED
from tsdkd.stages.methods.method import Method
from tsdkd.stages.methods.tsdkd import METHOD as PAPERS

METHOD = Method(
    name="tsdkd-released",
    title="TSD-KD as its code was released",
    means="with the reversed ranking, the entropy term on 90 % of the tokens, and one opener for each micro-batch",
    objective=replace(PAPERS.objective, released=RELEASED),
    options=tuple(name for name in PAPERS.options if name != "released"),
)
