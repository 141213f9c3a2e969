"""TSD-KD (Kim and Baek, ICLR 2026): ranking on the opener, gated divergence, entropy of the most uncertain tokens.

`alpha L_Indirect + L_Direct + L_EM`, eq. (13). Needs a teacher's signal. The paper's own data are the student's answers
(lambda = 1); it also reports the teacher's. docs/fidelity.md says where the paper leaves room.
"""

from dataclasses import fields

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.methods.method import Method

METHOD = Method(
    name="tsdkd",
    title="TSD-KD (Kim and Baek, ICLR 2026)",
    means=(
        "the student's own candidates ranked by the teacher on the opener of each response, distributions matched "
        "where the student is unsure and the teacher sure, entropy minimised on the most uncertain tokens"
    ),
    objective=TSDKDConfig(),
    options=tuple(field.name for field in fields(TSDKDConfig) if field.name != "policy_gradient_weight"),
)
