"""Random selection: a divergence at a random share of the tokens, the control of every selection.

Source: none; the control of `se-kd` and of other selections at the same share.
Data: scores of any responses with a distribution, or a loaded teacher.
Loss: `se-kd`'s, at `ceil(share L)` tokens that seed, step and response draw.
"""

from tsdkd.core.features import Features
from tsdkd.core.selective_objective import Selected
from tsdkd.stages.methods.method import Method
from tsdkd.stages.methods.se_kd import losses
from tsdkd.stages.methods.values import Options


def select(features: Features, options: Options) -> Selected:
    return {"divergence": features.mean(features.top_share(features.uniform, options["share"]))}


METHOD = Method(
    name="random-kd",
    full_name="divergence at random tokens",
    description="KL between both models at a random share of the tokens, drawn anew in each step",
    losses=losses,
    select=select,
    features=("uniform",),
    options={"share": 0.2, "direction": "forward"},
)
