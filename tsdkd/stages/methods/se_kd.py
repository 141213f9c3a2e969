"""SE-KD: a divergence at the tokens of the greatest student entropy.

Source: arXiv 2602.01395; the authors' code (almogtavor/SE-KD3x 08b2763).
Data: scores of any responses with a distribution, or a loaded teacher.
Loss: KL(p || q), its mean over the `ceil(share L)` tokens of a response with the greatest student entropy, then over
responses; share 0.2. On the student's own responses the paper takes KL(q || p): --method-option direction=reverse.

Differences from the paper: only tokens of responses count, and the paper's positions are those of packed documents; the
paper's choice of classes and of samples (SE-KD3X) is left out.
Difference from the code: it takes the mean over all selected tokens of a micro-batch.
"""

from tsdkd.core.features import Features
from tsdkd.core.losses import Divergence
from tsdkd.core.selective_objective import Selected
from tsdkd.errors import InputError
from tsdkd.stages.methods.method import Method
from tsdkd.stages.methods.values import Options

DIRECTIONS = {"forward": Divergence.jsd(0), "reverse": Divergence.jsd(1)}


def losses(options: Options) -> dict[str, Divergence]:
    if (direction := options["direction"]) not in DIRECTIONS:
        raise InputError(f"The direction is {direction!r}.", f"Choose {' or '.join(DIRECTIONS)}.")
    return {"divergence": DIRECTIONS[direction]}


def select(features: Features, options: Options) -> Selected:
    uncertain = features.top_share(features.student_entropy, options["share"])
    return {"divergence": features.mean(uncertain)}


METHOD = Method(
    name="se-kd",
    full_name="SE-KD (arXiv 2602.01395), selection of positions",
    description="KL between both models at the tokens where the student is most uncertain",
    losses=losses,
    select=select,
    features=("student_entropy",),
    options={"share": 0.2, "direction": "forward"},
)
