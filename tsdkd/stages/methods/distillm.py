"""DistiLLM: skew KL, and a schedule that moves from the teacher's responses to the student's.

Source: Ko et al., ICML 2024, Sec. 3.2 and Algorithm 1.
Data: online only: a loaded teacher, rollouts of `generate --policy teacher` or `given`, and held-out prompts.
Loss: `skew_kl`'s, or another `--divergence`.
Schedule (`stages/data/replay.py`): training begins with the recorded responses. phi, the probability of the student's
own responses, rises by 0.1 whenever the held-out divergence exceeds its reference by a tolerance. With probability
phi (1 - t/T) a step samples new responses and stores them; with the rest of phi it replays stored ones.

Differences from the paper: the schedule follows KL(teacher || student) on held-out responses, first measured after
--eval-steps steps (the paper: the validation loss, first measured before training); the loss has no language-modelling
term; training runs in one process.
"""

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.methods.method import DIVERGENCE_ONLY, Method

METHOD = Method(
    name="distillm",
    full_name="DistiLLM (Ko et al., ICML 2024)",
    description=(
        "a divergence at every token, first on the teacher's responses, then more and more on the student's own, new "
        "and replayed, as the held-out divergence requires"
    ),
    objective=TSDKDConfig(divergence="skew-kl", **DIVERGENCE_ONLY),
    objective_options=("divergence", "skew", "beta", "temperature"),
    authors=("teacher", "given"),
    uses_replay=True,
)
