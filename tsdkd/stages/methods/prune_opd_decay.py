"""Prune-OPD's decay: the weight falls with each token so far at which the models' k most likely tokens differ.

Source: arXiv 2605.07804 v3, eq. (5) to (11), as a public description gives them; the authors' code as
lx-Meteors/OPD-Test 82ffb3b, prune_opd.py, holds it. The paper's text was not read.
Data: scores of the student's responses with a whole distribution, or a loaded teacher.
Loss: `rethinking-opd-topk`'s, k = 16, with the weights `max(0, 1 - drop C_t) + base`. C_t counts the tokens up to and
including t at which fewer than `agreement` of the student's k most likely tokens are among the teacher's.

Differences from the paper: its control of the response length by these weights is left out, and so is its other measure
of agreement, the sampled token in the teacher's nucleus; the loss is the mean over a response's tokens, then over
responses.
Difference from the code: it weights the policy gradient of the k tokens that `rethinking_opd_topk` describes.
"""

from tsdkd.core.features import Features
from tsdkd.core.selective_objective import Selected
from tsdkd.stages.methods.method import Method
from tsdkd.stages.methods.rethinking_opd_topk import losses
from tsdkd.stages.methods.values import Options


def select(features: Features, options: Options) -> Selected:
    differ = (features.topk_agreement < options["agreement"]) & features.mask
    decay = (1 - options["drop"] * differ.cumsum(-1).double()).clamp(0, 1)
    return {"divergence": features.mean(features.mask) * (decay + options["base"])}


METHOD = Method(
    name="prune-opd-decay",
    full_name="Prune-OPD (arXiv 2605.07804), decay of the weights",
    description=(
        "KL from the student to the teacher on the student's k most likely tokens, with a weight that falls with each "
        "token so far at which both models' most likely tokens differ"
    ),
    losses=losses,
    select=select,
    features=("topk_agreement",),
    options={"k": 16, "agreement": 0.7, "drop": 0.01, "base": 0.5},
)
