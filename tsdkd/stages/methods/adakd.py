"""AdaKD: reverse KL at the most difficult tokens, with a temperature for each token, both adapted during training.

Source: arXiv 2510.11615 (AAAI 2026), eq. (3) to (10); the authors' code (SassyRong/AdaKD 3b9be1b).
Data: scores of any responses with a whole distribution, or a loaded teacher; the paper's are a dataset's responses.
Loss: `tau^2 KL(q || p)` at the temperature `tau = temperature exp(-c tanh(log(s/median)))`, its mean over the
`floor(r N)` most difficult of the step's N tokens. The difficulty s is the Hellinger distance; c 0.5.
Schedule: the share r is 1 during the first 5 % (`warmup`) of the steps. Then r falls by 5 % (`rate`) whenever the
running mean of the loss (`decay` 0.99) is 5 % (`tolerance`) below its value at the last change, and rises by 5 %
whenever it is 5 % above.

Open in the paper, as in the code here: tau^2 in the loss (eq. (2) has it, the gradient of eq. (11) has not), the
numbers of the schedule, and 0.1 as the least r. The median is that of the selected tokens; median=all takes all tokens,
the other reading of eq. (9).
Differences from the code: tau carries no gradient, as in the paper; selection, median and schedule are those of the
optimizer step, and the code's are those of each micro-batch; the end of the warm-up gives the first reference, and in
the code the step after it does.
"""

from collections.abc import Mapping
from typing import Any

from tsdkd.core.config import ROUNDING
from tsdkd.core.features import Features
from tsdkd.core.losses import Divergence
from tsdkd.core.selective_objective import Selected, Weighted
from tsdkd.errors import InputError
from tsdkd.stages.methods.method import Method
from tsdkd.stages.methods.values import Options

LEAST_SHARE, LEAST_DIFFICULTY = 0.1, 1e-8
MEDIANS = ("selected", "all")


def losses(options: Options) -> dict[str, Divergence]:
    if (median := options["median"]) not in MEDIANS:
        raise InputError(f"The median is {median!r}.", f"Choose {' or '.join(MEDIANS)}.")
    for name in ("warmup", "decay", "tolerance", "rate"):
        if not 0 <= (value := options[name]) < 1:
            raise InputError(f"The option {name} is {value}.", "Choose a number in [0, 1).")
    return {"divergence": Divergence.jsd(1)}


def select(features: Features, options: Options) -> Selected:
    if features.step >= options["warmup"] * features.steps:
        _adapt_share(features.state, options)
    mask, difficulty = features.mask, features.hellinger
    count = max(1, int(int(mask.sum()) * features.state["share"] * (1 + ROUNDING)))
    selected = mask & (features.batch_ranks(difficulty) < count)
    median = difficulty[selected if options["median"] == "selected" else mask].median()
    relative = difficulty / median.clamp(min=LEAST_DIFFICULTY)
    scale = relative.clamp(min=LEAST_DIFFICULTY).log().tanh()
    temperature = options["temperature"] * (-options["c"] * scale).exp()
    return {"divergence": Weighted(features.batch_mean(selected) * temperature.square(), temperature)}


def _adapt_share(state: dict[str, Any], options: Options) -> None:
    """Change the share by the running mean of the loss, compared with its value at the last change."""
    mean, reference = state["mean"], state["reference"]
    if mean is None or reference is None:
        state["reference"] = mean
    elif mean < reference * (1 - options["tolerance"]):
        state |= {"share": max(LEAST_SHARE, state["share"] * (1 - options["rate"])), "reference": mean}
    elif mean > reference * (1 + options["tolerance"]):
        state |= {"share": min(1.0, state["share"] * (1 + options["rate"])), "reference": mean}


def update(state: dict[str, Any], terms: Mapping[str, float], options: Options) -> None:
    loss, decay = terms["divergence"], options["decay"]
    state["mean"] = loss if state["mean"] is None else decay * state["mean"] + (1 - decay) * loss


METHOD = Method(
    name="adakd",
    full_name="AdaKD (arXiv 2510.11615)",
    description=(
        "KL from the student to the teacher at the tokens where both differ most, whose share follows the loss, with a "
        "lower temperature where they differ more"
    ),
    losses=losses,
    select=select,
    update=update,
    features=("hellinger",),
    options={
        "c": 0.5,
        "temperature": 1.0,
        "median": "selected",
        "warmup": 0.05,
        "decay": 0.99,
        "tolerance": 0.05,
        "rate": 0.05,
    },
    scope="batch",
    state={"share": 1.0, "mean": None, "reference": None},
)
