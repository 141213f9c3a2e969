"""EOPD: reverse KL at every token, and forward KL beside it where the teacher is uncertain.

Source: arXiv 2603.07079 (ICML 2026), as public descriptions give it, and the authors' code as its fork
ckjsuperhh/CacheEOPD 122d030 holds it. The paper's text was not read.
Data: scores of any responses with a distribution, or a loaded teacher; the paper takes the student's responses.
Loss: `1/L sum_t KL(q || p) + alpha [H(p) >= tau] sum_v p_v log(p_v/q_v)`. The second sum runs over the teacher's k
most likely tokens, with p renormalised on them and q not; alpha 1, tau 0.8 nats, k 16.

Differences from the paper: KL(q || p) over the vocabulary replaces its policy gradient at the response's token, whose
expectation on the student's own responses is the same gradient; no clipping as in PPO.
Difference from the code: the loss is the mean over a response's tokens, then over responses, and the code's is the mean
over all tokens of a micro-batch.
"""

from tsdkd.core.features import Features
from tsdkd.core.losses import Divergence, Loss, TopK
from tsdkd.core.selective_objective import Selected, Weighted
from tsdkd.stages.methods.method import Method
from tsdkd.stages.methods.values import Options


def losses(options: Options) -> dict[str, Loss]:
    forward = TopK(Divergence.jsd(0), options["k"], "teacher", renormalized="teacher")
    return {"divergence": Divergence.jsd(1), "forward": forward}


def select(features: Features, options: Options) -> Selected:
    mean = features.mean(features.mask)
    uncertain = features.teacher_entropy >= options["tau"]
    return {"divergence": mean, "forward": Weighted(mean * uncertain, factor=options["alpha"])}


METHOD = Method(
    name="eopd",
    full_name="EOPD (arXiv 2603.07079)",
    description="KL from the student to the teacher at every token, and the forward one where the teacher is uncertain",
    losses=losses,
    select=select,
    features=("teacher_entropy",),
    options={"alpha": 1.0, "tau": 0.8, "k": 16},
)
