"""IW-OPD: reverse KL with greater weights at the tokens before which the models have disagreed little.

Source: arXiv 2606.22600 v3, eq. (17), as a public description gives it; the authors' code
(YannX1e/Importance-Weighted-On-Policy-Distillation b1320d3) and TRL's (huggingface/trl f2cd577). The paper's text was
not read.
Data: scores of any responses with a whole distribution, or a loaded teacher; the paper takes the student's responses.
Loss: `1/L sum_t w_t KL(q || p)`, `w_t = 1 + gamma (1 - sum_{k<t} |A_k| / sum_k |A_k|)`, A = log p(y) - log q(y) at the
response's token y; gamma 0.5. --method-option sampled=true takes the paper's loss, the policy gradient at y with the
advantage w_t A_t, from responses that the student samples.

Differences from the paper: without sampled=true, KL(q || p) over the vocabulary replaces the policy gradient; the
weights depend on the sampled tokens, so its gradient is not exactly the expectation of the policy gradient. q is the
current student's, also for recorded responses; no clipping as in PPO and no correction for the engine's probabilities.
Open in the paper: in the description of eq. (17) the whole sum ends before the last token; both codes include it.
"""

from tsdkd.core.features import Features
from tsdkd.core.losses import Divergence, Loss, PolicyGradient
from tsdkd.core.selective_objective import Selected
from tsdkd.errors import InputError
from tsdkd.stages.methods.method import Method
from tsdkd.stages.methods.values import Options

LEAST_SUM = 1e-8


def losses(options: Options) -> dict[str, Loss]:
    if (gamma := options["gamma"]) < 0:
        raise InputError(f"gamma is {gamma}.", "Choose 0 or more.")
    return {"policy_gradient": PolicyGradient()} if options["sampled"] else {"divergence": Divergence.jsd(1)}


def select(features: Features, options: Options) -> Selected:
    advantage = features.teacher_log_prob - features.student_log_prob
    size = advantage.abs()
    before = (size.cumsum(-1) - size) / size.sum(-1, keepdim=True).clamp(min=LEAST_SUM)
    weights = features.mean(features.mask) * (1 + options["gamma"] * (1 - before).clamp(0, 1))
    return {"policy_gradient": weights * advantage} if options["sampled"] else {"divergence": weights}


METHOD = Method(
    name="iw-opd",
    full_name="IW-OPD (arXiv 2606.22600)",
    description=(
        "KL from the student to the teacher, or its policy gradient, with greater weights before the models have "
        "disagreed much"
    ),
    losses=losses,
    select=select,
    features=("student_log_prob", "teacher_log_prob"),
    options={"gamma": 0.5, "sampled": False},
)
