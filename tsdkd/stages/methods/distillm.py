"""DistiLLM (Ko et al., ICML 2024): skew KL, and a schedule of when the student answers and when it is replayed.

Training begins on recorded responses of the teacher. Each time the held-out divergence is above its mark by
a tolerance, the probability phi of the student's own responses rises by 0.1. A step then answers afresh with
probability phi (1 - t/T) and keeps the answers; with the rest of phi it learns from kept ones (Algorithm 1 and Sec. 3.2
there; `training/replay.py`). Needs a live teacher, rollouts of `generate --policy teacher`, and held-out prompts.

Departs: what is measured is KL(teacher || student) on held-out responses, for the first time after --eval-steps steps
(there: the validation loss, also before the first step); no language-modelling term; one process.
"""

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.methods.method import DIVERGENCE_ONLY, Method

METHOD = Method(
    name="distillm",
    title="DistiLLM (Ko et al., ICML 2024)",
    means=(
        "a divergence at every token, on the teacher's responses at first and more and more on the student's "
        "own, fresh and replayed, as the held-out divergence demands"
    ),
    objective=TSDKDConfig(divergence="skew-kl", **DIVERGENCE_ONLY),
    options=("divergence", "skew", "beta", "temperature"),
    authors=("teacher",),
    replays=True,
)
