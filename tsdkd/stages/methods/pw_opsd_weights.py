"""PW-OPSD's position weights: a divergence that counts more at the later tokens of a response.

Source: arXiv 2605.21606, as public descriptions give it; the authors' code (SaFo-Lab/PW-OPSD 35303e0),
ea_opsd_trainer.py. The paper's text was not read.
Data: scores of any responses with a distribution, or a loaded teacher; the paper takes the student's responses.
Loss: `1/L sum_t w_t KL(p || q)`, `w_t = minimum + (1 - minimum) sigmoid(((t - 1/2)/L - center) / width)`, t = 1..L,
then the mean over responses, as in the paper.

Differences from the paper: this is its weights alone. The paper distils the model from itself with the solution in the
prompt, at temperature 1.1, and clips the divergence's term of each token of the vocabulary at 0.05.
"""

from tsdkd.core.features import Features
from tsdkd.core.selective_objective import Selected
from tsdkd.errors import InputError
from tsdkd.stages.methods.method import Method
from tsdkd.stages.methods.se_kd import losses
from tsdkd.stages.methods.values import Options


def select(features: Features, options: Options) -> Selected:
    if options["width"] <= 0:
        raise InputError(f"The width is {options['width']}.", "Choose a width above 0.")
    reached = (features.position.double() + 0.5) / features.length
    rise = ((reached - options["center"]) / options["width"]).sigmoid()
    weights = options["minimum"] + (1 - options["minimum"]) * rise
    return {"divergence": features.mean(features.mask) * weights}


METHOD = Method(
    name="pw-opsd-weights",
    full_name="PW-OPSD (arXiv 2605.21606), position weights",
    description="KL between both models with greater weights at later tokens",
    losses=losses,
    select=select,
    options={"minimum": 0.25, "center": 0.3, "width": 0.1, "direction": "forward"},
)
