"""Reverse KL on the student's k most likely tokens: the loss of "Rethinking OPD".

Source: arXiv 2604.13016, eq. (5), as public descriptions give it; the authors' code (thunlp/OPD 0a44395),
compute_distillation_reward. The paper's text was not read.
Data: scores of the student's responses with a whole distribution, or a loaded teacher.
Loss: `KL(q || p)` of both distributions renormalised on the student's k most likely tokens, k = 16.

Differences from the paper: the loss is the mean over a response's tokens, then over responses; the supervised start and
the teacher's prompts are left out.
Difference from the code: it takes `sum_v q_v log(q_v/p_v)` with q_v renormalised in the weight alone, as a policy
gradient, which also moves probability between the k tokens and the rest.
"""

from tsdkd.core.features import Features
from tsdkd.core.losses import Divergence, TopK
from tsdkd.core.selective_objective import Selected
from tsdkd.stages.methods.method import Method
from tsdkd.stages.methods.values import Options


def losses(options: Options) -> dict[str, TopK]:
    return {"divergence": TopK(Divergence.jsd(1), options["k"], "student")}


def select(features: Features, options: Options) -> Selected:
    return {"divergence": features.mean(features.mask)}


METHOD = Method(
    name="rethinking-opd-topk",
    full_name="Rethinking OPD (arXiv 2604.13016), student top-k",
    description="KL from the student to the teacher on the student's k most likely tokens, at every token",
    losses=losses,
    select=select,
    options={"k": 16},
)
