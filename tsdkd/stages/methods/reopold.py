"""REOPOLD: policy gradient whose reward has a floor; first without the lowest rewards, then at uncertain tokens.

Source: arXiv 2603.11137, eq. (4) and (7) to (10), as public reading notes and the baseline of PW-OPSD
(SaFo-Lab/PW-OPSD 35303e0) give them. The paper's text was not read, and none of its authors' code was found.
Data: scores of the student's responses with a whole distribution, or a loaded teacher.
Loss: `-A log q(y)`, `A = max(log p(y)/q(y), floor)` without gradient, `floor = log(mixture) / (1 - mixture)`; its mean
over the step's selected tokens. Before the fraction `switch` of the steps, tokens with `log p(y)/q(y)` of at
least the floor are selected; then those whose student entropy reaches the step's quantile `1 - share`.

Difference from the paper: q is the current student's, without a ratio to the one that sampled.

Open: the sources disagree on two points. The floor is `log(mixture / (1 - mixture))` in some. The form above is the
limit, as r = p(y)/q(y) falls to 0, of the bound that they report,
`log r <= log(mixture + (1 - mixture) r) / (1 - mixture)`; the other is no limit of it, and for mixtures of 1/2 and more
it leaves no negative reward. Some have mixture 0.3 and switch after a third of the steps; the defaults are PW-OPSD's,
which calls mixture 0.1, share 0.2 and half of the steps the paper's.
"""

from math import log

from tsdkd.core.features import Features
from tsdkd.core.losses import PolicyGradient
from tsdkd.core.selective_objective import Selected
from tsdkd.errors import InputError
from tsdkd.stages.methods.method import Method
from tsdkd.stages.methods.values import Options


def losses(options: Options) -> dict[str, PolicyGradient]:
    mixture, share = options["mixture"], options["share"]
    if not 0 < mixture < 1:
        raise InputError(f"The mixture is {mixture}.", "Choose a mixture in (0, 1).")
    if not 0 < share <= 1:
        raise InputError(f"The share of tokens is {share}.", "Choose a share in (0, 1].")
    return {"policy_gradient": PolicyGradient()}


def select(features: Features, options: Options) -> Selected:
    floor = log(options["mixture"]) / (1 - options["mixture"])
    rewards, entropies = features.teacher_log_prob - features.student_log_prob, features.student_entropy
    if features.step < options["switch"] * features.steps:
        selected = rewards >= floor
    else:
        selected = entropies >= entropies[features.mask].double().quantile(1 - options["share"])
    return {"policy_gradient": features.batch_mean(selected) * rewards.clamp(min=floor)}


METHOD = Method(
    name="reopold",
    full_name="REOPOLD (arXiv 2603.11137)",
    description=(
        "the policy gradient of the sampled token with a floor under its reward, first without the tokens of the "
        "lowest reward, then at the tokens where the student is most uncertain"
    ),
    losses=losses,
    select=select,
    features=("teacher_log_prob", "student_log_prob", "student_entropy"),
    options={"mixture": 0.1, "share": 0.2, "switch": 0.5},
    scope="batch",
)
