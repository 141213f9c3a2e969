"""Whether the entropy term is likely to harm, by docs/study.md: every number here is in docs/study/tables.md.

The study compares final accuracy with GKD from the same start, in points, with 95 % intervals: on sums of digits, and
on plans, whose students are nearer to their teacher.
"""

from typing import Any

from tsdkd.stages.config.doctor import DoctorConfig
from tsdkd.stages.doctor.findings import Finding, finding
from tsdkd.stages.doctor.response_findings import Sampled

SMALLEST_RATE = 2.5e-5
"""The smallest learning rate of the study."""
HARMFUL_RATIO = 0.01
"""The smallest entropy weight, relative to the direct weight, that the study measured without the indirect term."""
BY_RATE = "-6.9 ± 3.5 at 2.5e-05, -22.5 ± 7.0 at 0.0001, -46.7 ± 12.8 at 0.0004"
"""With all terms and the paper's weights."""
BY_START = "-1.8 ± 2.8, -22.5 ± 7.0 and -5.9 ± 3.1 from students at 25, 50 and 85 %"
BY_WEIGHT = "-24.1 ± 5.5 with weight 1 : 1, -2.2 ± 1.0 with 1 : 0.01"
"""With gate and entropy term alone; weights direct : entropy."""
MILD = "-4.8 ± 2.8 with direct : indirect : entropy 10 : 0.1 : 0.01, +0.8 ± 1.6 with 100 : 0.1 : 0.01"
ON_PLANS = "all terms -0.3 ± 1.0 greedy and -0.5 ± 2.0 at temperature 1"
"""At 1e-4, from students at 85 %."""
SUMS_KL, SUMS_ENTROPY = (0.0555, 0.1552), (0.171, 0.280)
"""Smallest and largest mean over seeds of the study's three students before training: KL(teacher || student) and
entropy, in nats."""


def check_entropy_term(sampled: Sampled, config: DoctorConfig) -> Finding:
    """Whether the entropy term is likely to harm, by its weight, the learning rate, and the pair's KL and entropy."""
    objective, rate = config.objective, config.learning_rate
    kl, entropy = sampled.teacher.mean("kl"), sampled.teacher.mean("student_entropy")
    ratio = objective.em_weight / objective.direct_weight if objective.direct_weight else float("inf")
    values: dict[str, Any] = {
        "kl": kl,
        "student_entropy": entropy,
        "em_weight": objective.em_weight,
        "learning_rate": rate,
    }
    if not objective.em_weight:
        return finding("entropy_term", "The entropy term is off.", values=values | {"harm": "none"})
    comparable = SUMS_KL[0] <= kl <= SUMS_KL[1] and SUMS_ENTROPY[0] <= entropy <= SUMS_ENTROPY[1]
    pair = f"KL(teacher || student) is {kl:.3f} and the student's entropy {entropy:.3f} nats, " + (
        "like the study's students."
        if comparable
        else f"outside the study's {SUMS_KL[0]} to {SUMS_KL[1]} and {SUMS_ENTROPY[0]} to {SUMS_ENTROPY[1]}."
    )
    page = "docs/study/tables.md, points of greedy accuracy against GKD on sums of digits, 95 %:"
    if ratio < HARMFUL_RATIO:
        reason = (
            f"No run of the study shows harm of an entropy weight of {ratio:g} of the direct weight alone; with the "
            f"indirect term ({page} {MILD}). {pair}"
        )
        return finding("entropy_term", reason, values=values | {"harm": "not shown"})
    if rate < SMALLEST_RATE:
        reason = (
            f"The study does not show whether the entropy term harms at the learning rate {rate:g}: its smallest is "
            f"{SMALLEST_RATE:g}, and the harm shrinks with the rate ({page} {BY_RATE})."
        )
        remedy = "Compare with --method gkd on the same prompts and seeds, or lower --em-weight."
        return finding(
            "entropy_term",
            reason,
            pair,
            remedy,
            values=values | {"harm": "unknown"},
        )
    numbers = f"{page} {BY_WEIGHT}; all terms {BY_RATE}, and {BY_START}"
    remedy = "Use --method gkd, or compare with it --direct-weight 10 --em-weight 0.01 at several learning rates."
    if comparable:
        reason = f"With this entropy weight, accuracy is likely to end below GKD's ({numbers})."
        return finding("entropy_term", reason, pair, remedy, values=values | {"harm": "likely"})
    reason = (
        f"The study does not show whether the entropy term harms this pair: on sums accuracy ends below GKD's "
        f"({numbers}), on plans it does not ({ON_PLANS}), but the student gives up free choices."
    )
    return finding("entropy_term", reason, pair, remedy, values=values | {"harm": "unknown"})
