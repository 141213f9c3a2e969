"""ToDi: forward and reverse KL, mixed at each token of the vocabulary by the ratio of both probabilities.

Source: Jung et al., EMNLP 2025 (arXiv 2505.16297), as public descriptions give it; the authors' code
(jungseongryong/ToDi 45f1f8b), compute_ToDi. The paper's text was not read.
Data: scores of any responses with a whole distribution, or a loaded teacher; the paper's are a dataset's responses.
Loss: `sum_v a_v p_v log(p_v/q_v) + (1 - a_v) q_v log(q_v/p_v)`, `a_v = sigmoid(beta log(p_v/q_v))` without gradient.

Differences from the code: the temperature is 1, and the authors' scripts take 2; the loss has no cross-entropy on the
dataset's responses, which has half of the weight there; it is the mean over a response's tokens, then over responses.
"""

from tsdkd.core.features import Features
from tsdkd.core.losses import ToDi
from tsdkd.core.selective_objective import Selected, Weighted
from tsdkd.stages.methods.method import Method
from tsdkd.stages.methods.values import Options


def select(features: Features, options: Options) -> Selected:
    return {"divergence": Weighted(features.mean(features.mask), options["temperature"])}


METHOD = Method(
    name="todi",
    full_name="ToDi (Jung et al., EMNLP 2025)",
    description="forward and reverse KL, mixed at each token of the vocabulary, at every token",
    losses=lambda options: {"divergence": ToDi(options["beta"])},
    select=select,
    options={"beta": 1.0, "temperature": 1.0},
)
