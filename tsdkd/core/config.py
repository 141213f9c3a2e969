"""The objective's hyperparameters, under the paper's symbols; loads without torch."""

from dataclasses import dataclass
from typing import Literal

from tsdkd.errors import InputError

ROUNDING = 1e-12
"""0.07 * 100 is 7.000000000000001 in binary: boundaries are met when they are missed by no more than this share."""


@dataclass(frozen=True)
class TSDKDConfig:
    """Hyperparameters of eq. (13), `L = alpha L_Indirect + L_Direct + L_EM`; defaults are Table 10's.

    A weight of 0 switches a term off. `opener=1.0` with `gate=False` is the paper's "no selection" ablation.
    """

    alpha: float = 0.1
    """Weight of the indirect (ranking) term, eq. (13)."""
    beta: float = 0.9
    """Generalised JSD, eq. (1): 0 is forward KL(teacher || student), 1 is reverse KL."""
    tau: float = 1.0
    """Sharpness of the uncertainty gate, eq. (11); the paper gives no value, the released code uses 1."""
    gate: bool = True
    """Weigh each position's divergence by the gate; False weighs all positions alike."""
    k: int = 10
    """Candidates the student proposes at each opener position."""
    opener: float | Literal["adaptive"] = 0.1
    """Share c of the response's entropy that the opener holds, or "adaptive" (Algorithm 2)."""
    em_ratio: float = 0.1
    """Share of positions, by entropy, on which entropy is minimised, eq. (12)."""
    temperature: float = 1.0
    """KD temperature: divides both models' logits before every softmax."""
    indirect_reduction: Literal["mean", "sum"] = "mean"
    """Over the opener's positions: "sum" is eq. (5) to the letter, "mean" is what alpha = 0.1 was tuned with."""
    direct_weight: float = 1.0
    """Weight of the direct (divergence) term; 1 in the paper."""
    em_weight: float = 1.0
    """Weight of the entropy term; 1 in the paper."""

    def __post_init__(self) -> None:
        for name, good, range_ in (
            ("alpha", self.alpha >= 0, "0 or more"),
            ("beta", 0 <= self.beta <= 1, "between 0 and 1"),
            ("tau", self.tau > 0, "above 0"),
            ("k", self.k >= 2, "2 or more"),
            ("opener", _is_share(self.opener) or self.opener == "adaptive", "in (0, 1] or 'adaptive'"),
            ("em_ratio", 0 < self.em_ratio <= 1, "in (0, 1]"),
            ("temperature", self.temperature > 0, "above 0"),
            ("indirect_reduction", self.indirect_reduction in ("mean", "sum"), "'mean' or 'sum'"),
            ("direct_weight", self.direct_weight >= 0, "0 or more"),
            ("em_weight", self.em_weight >= 0, "0 or more"),
        ):
            if not good:
                raise InputError(f"{name} is {getattr(self, name)}.", f"Choose a value {range_}.")
        if not (self.alpha or self.direct_weight or self.em_weight):
            raise InputError(
                "All three terms have weight 0.", "Give alpha, direct_weight or em_weight a value above 0."
            )


def _is_share(value: float | str) -> bool:
    return isinstance(value, int | float) and 0 < value <= 1
