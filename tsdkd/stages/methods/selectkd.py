"""SelecTKD: a divergence at the tokens where the teacher accepts the student's most likely token (greedy top k).

Source: arXiv 2510.24021 (CVPR 2026), as two independent descriptions give it. They agree on the rule, k and the weight
of rejected tokens; one of them gives the mean over all L tokens. The paper's text was not read, and no code is public.
Data: scores of any responses with a distribution, or a loaded teacher.
Loss: `1/L sum_t V_t KL(p || q)`. V_t is 1 where the student's most likely token is among the teacher's k most likely
ones, elsewhere `rejected` (the paper's beta); k 5, rejected 0.01. The paper adds V_t to several losses: --method-option
direction=reverse takes KL(q || p).

Differences from the paper: the proposals by sampling (Spec-k) are left out, and so are the losses and rollouts of
DistiLLM-2, which the paper's main results build on.
"""

from tsdkd.core.features import Features
from tsdkd.core.selective_objective import Selected
from tsdkd.errors import InputError
from tsdkd.stages.methods.method import Method
from tsdkd.stages.methods.se_kd import losses
from tsdkd.stages.methods.values import Options


def select(features: Features, options: Options) -> Selected:
    if not 0 <= (rejected := options["rejected"]) <= 1:
        raise InputError(f"The weight of rejected tokens is {rejected}.", "Choose a weight in [0, 1].")
    accepted = (features.teacher_rank < options["k"]).double()
    return {"divergence": features.mean(features.mask) * (rejected + (1 - rejected) * accepted)}


METHOD = Method(
    name="selectkd",
    full_name="SelecTKD (arXiv 2510.24021), greedy top k",
    description=(
        "KL between both models, with a small weight where the student's most likely token is not among the teacher's k"
    ),
    losses=losses,
    select=select,
    features=("teacher_rank",),
    options={"k": 5, "rejected": 0.01, "direction": "forward"},
)
