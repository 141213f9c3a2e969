"""Options of the objective, by field of `TSDKDConfig`, which knows no command line."""

from tsdkd.core.config import RELEASED
from tsdkd.stages.config.groups import OBJECTIVE
from tsdkd.stages.config.option import Option

OBJECTIVE_OPTIONS = {
    "alpha": Option("Weight of the indirect (ranking) term.", OBJECTIVE, min=0),
    "beta": Option("Generalised JSD. 0: forward KL; 1: reverse KL.", OBJECTIVE, min=0, max=1),
    "divergence": Option("Divergence of the direct term.", OBJECTIVE),
    "skew": Option("Skew of the skew divergences, in (0, 1).", OBJECTIVE, metavar="X"),
    "tau": Option("Sharpness of the gate, above 0.", OBJECTIVE),
    "gate": Option("Weight the divergence by the entropy gap.", OBJECTIVE),
    "k": Option("Candidates that are ranked per position.", OBJECTIVE, min=2),
    "opener": Option("Opener: fraction of the response's entropy, or adaptive.", OBJECTIVE, metavar="X", common=True),
    "em_ratio": Option("Fraction of positions whose entropy is minimised, in (0, 1].", OBJECTIVE),
    "temperature": Option("Distillation temperature, above 0; divides both models' logits.", OBJECTIVE),
    "indirect_reduction": Option("Reduction of the indirect term over the opener.", OBJECTIVE),
    "direct_weight": Option("Weight of the direct (divergence) term.", OBJECTIVE, min=0),
    "em_weight": Option("Weight of the entropy term.", OBJECTIVE, min=0),
    "released": Option(
        f"Deviations of the released code, joined by commas: {', '.join(RELEASED)}.",
        OBJECTIVE,
        metavar="NAMES",
        shown="none",
    ),
}
"""`policy_gradient_weight` is no option: only the method MiniLLM sets it."""
