"""TrOPD's loss: policy gradient at trusted tokens, forward KL on the teacher's k most likely tokens at the others.

Source: arXiv 2606.01249 v3, eq. (8), (10) and (13), as public reading notes give them, which report inconsistent signs
in the paper. Neither the paper's text nor the authors' code was read.
Data: scores of the student's responses with a whole distribution, or a loaded teacher.
Loss: y is trusted with probability `min(1, p(y)/q(y))`, drawn anew for each token and step. A trusted token has `-A log
q(y)`, `A = log p(y)/q(y)` without gradient; any other has `sum_v p_v log(p_v/q_v)` over the teacher's k most likely
tokens without renormalisation, k = 64.

Differences from the paper: its teacher-written prefixes are left out; the loss is the mean over a response's tokens,
then over responses; q is the current student's, without a ratio to the one that sampled.
Differences from the code, by the notes: it renormalises the teacher's k probabilities, and uses the KL of other tokens,
without gradient, as a negative advantage.
"""

from tsdkd.core.features import Features
from tsdkd.core.losses import Divergence, Loss, PolicyGradient, TopK
from tsdkd.core.selective_objective import Selected
from tsdkd.stages.methods.method import Method
from tsdkd.stages.methods.values import Options


def losses(options: Options) -> dict[str, Loss]:
    return {"trusted": PolicyGradient(), "others": TopK(Divergence.jsd(0), options["k"], "teacher", "neither")}


def select(features: Features, options: Options) -> Selected:
    advantages = features.teacher_log_prob - features.student_log_prob
    trusted = features.uniform < advantages.exp()
    mean = features.mean(features.mask)
    return {"trusted": mean * advantages * trusted, "others": mean * ~trusted}


METHOD = Method(
    name="tropd-loss",
    full_name="TrOPD (arXiv 2606.01249), loss",
    description=(
        "the policy gradient of the sampled token where a draw by both models' probabilities trusts it, elsewhere KL "
        "from the teacher on the teacher's k most likely tokens"
    ),
    losses=losses,
    select=select,
    features=("teacher_log_prob", "student_log_prob", "uniform"),
    options={"k": 64},
)
