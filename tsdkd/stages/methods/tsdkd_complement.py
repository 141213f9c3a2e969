"""TSD-KD whose ranking has one more candidate: all tokens outside the student's k together.

Source: Kim and Baek, ICLR 2026, eq. (13).
Data: scores of any responses with a whole distribution, or a loaded teacher.
Loss: `tsdkd`'s, whose indirect term ranks k + 1 candidates. The last one has the sum of the other tokens' probabilities
under either model; the teacher ranks it by that sum like every other candidate.

Difference from the paper: the last candidate. With it, the first choice of the Plackett-Luce likelihood has the
student's own probabilities, so a common shift of the k logits changes the loss.
"""

from tsdkd.core.features import Features
from tsdkd.core.losses import Divergence, Entropy, Loss, Ranking
from tsdkd.core.selective_objective import Selected, Weighted
from tsdkd.stages.methods.method import Method
from tsdkd.stages.methods.values import Options


def losses(options: Options) -> dict[str, Loss]:
    ranking = Ranking(options["k"], rest=True)
    return {"indirect": ranking, "direct": Divergence.jsd(options["beta"]), "entropy": Entropy()}


def select(features: Features, options: Options) -> Selected:
    from tsdkd.core.selection import opener_mask, uncertainty_gate

    student, teacher = features.student_entropy, features.teacher_entropy
    opener = opener_mask(student, features.mask, options["opener"])
    gate = uncertainty_gate(student, teacher, options["tau"])
    return {
        "indirect": Weighted(features.mean(opener), factor=options["alpha"]),
        "direct": features.mean(features.mask) * gate,
        "entropy": Weighted(
            features.mean(features.top_share(student, options["em_ratio"])), factor=options["em_weight"]
        ),
    }


METHOD = Method(
    name="tsdkd-complement",
    full_name="TSD-KD (Kim and Baek, ICLR 2026) with the complement in its ranking",
    description="TSD-KD's three terms, whose ranking compares the candidates with all other tokens too",
    losses=losses,
    select=select,
    features=("student_entropy", "teacher_entropy"),
    options={"alpha": 0.1, "beta": 0.9, "k": 10, "opener": 0.1, "tau": 1.0, "em_ratio": 0.1, "em_weight": 1.0},
)
