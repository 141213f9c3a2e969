"""TSD-KD: the indirect, direct and entropy terms on selected tokens.

Source: Kim and Baek, ICLR 2026.
Data: scores of the student's responses (the paper's lambda = 1), or of any others; or a loaded teacher.
Loss: `alpha L_Indirect + L_Direct + L_EM`, eq. (13): ranking of the student's candidates on the opener, divergence
weighted by the gate, entropy of the most uncertain tokens.

docs/fidelity.md lists the details that the paper leaves open.
"""

from dataclasses import fields

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.methods.method import Method

METHOD = Method(
    name="tsdkd",
    full_name="TSD-KD (Kim and Baek, ICLR 2026)",
    description=(
        "the teacher ranks the student's candidates on the opener of each response, a divergence from the teacher "
        "counts where the student is less certain than the teacher, and entropy is minimised on the most uncertain "
        "tokens"
    ),
    objective=TSDKDConfig(),
    objective_options=tuple(field.name for field in fields(TSDKDConfig) if field.name != "policy_gradient_weight"),
)
