"""The objective's hyperparameters, under the paper's symbols; loads without torch."""

from dataclasses import dataclass
from typing import Literal, get_args

from tsdkd.errors import InputError

ROUNDING = 1e-12
"""0.07 * 100 is 7.000000000000001 in binary: boundaries are met when they are missed by no more than this share."""
DivergenceName = Literal["jsd", "skew-kl", "skew-reverse-kl"]
RELEASED = ("ranking", "opener", "entropy")
"""Where the released code departs from the paper. ranking: the likelihood of the *reversed* ranking. opener: one length
for all responses, of as many tokens as come before the entropies of the batch, row after row, reach the share c.
entropy: it is minimised wherever it is at least the batch's quantile `em_ratio`, on 90 % of the tokens. The last two
take their means over all tokens of the batch; a batch is what a call of the loss is given."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """`teacher KL(P || M) + student KL(Q || M)`, `M = mix P + (1 - mix) Q`, P the teacher, Q the student.

    One of the three below: their gradients in closed form are known.
    """

    mix: float
    teacher: float
    student: float

    @classmethod
    def jsd(cls, beta: float) -> "Divergence":
        """Generalised JSD, eq. (1); at the ends, where it vanishes, the limit of its direction: KL(P || Q) at 0,
        KL(Q || P) at 1, as in GKD (Agarwal et al. 2024)."""
        return cls(beta, 1.0, 0.0) if beta == 0 else cls(beta, 0.0, 1.0) if beta == 1 else cls(beta, beta, 1 - beta)

    @classmethod
    def skew_kl(cls, skew: float) -> "Divergence":
        """KL(P || skew P + (1 - skew) Q) of DistiLLM (Ko et al. 2024)."""
        return cls(skew, 1.0, 0.0)

    @classmethod
    def skew_reverse_kl(cls, skew: float) -> "Divergence":
        """KL(Q || (1 - skew) P + skew Q) of DistiLLM (Ko et al. 2024)."""
        return cls(1 - skew, 0.0, 1.0)


TERMS = {
    "indirect": "alpha",
    "direct": "direct_weight",
    "entropy": "em_weight",
    "policy_gradient": "policy_gradient_weight",
}
"""The terms of the loss, and the field of `TSDKDConfig` that weights each; config, log, screen and report use them."""


@dataclass(frozen=True)
class TSDKDConfig:
    """Hyperparameters of eq. (13), `L = alpha L_Indirect + L_Direct + L_EM`; defaults are Table 10's.

    A weight of 0 switches a term off. `opener=1.0` with `gate=False` is the paper's "no selection" ablation.
    With `alpha=0`, `em_weight=0` and `gate=False` it is a divergence at every token.
    """

    alpha: float = 0.1
    """Weight of the indirect (ranking) term, eq. (13)."""
    beta: float = 0.9
    """Generalised JSD, eq. (1): 0 is forward KL(teacher || student), 1 is reverse KL."""
    divergence: DivergenceName = "jsd"
    """Of the direct term."""
    skew: float = 0.1
    """Of the skew KLs: the share of their own first argument in the mixture they are taken to; 0.1 in DistiLLM."""
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
    policy_gradient_weight: float = 0.0
    """Weight of MiniLLM's long-range term, which also brings its importance weights; 1 in MiniLLM."""
    released: tuple[str, ...] = ()
    """Where the released code's form is taken, of `RELEASED`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "released", tuple(self.released))  # JSON knows lists alone
        for name, good, range_ in (
            ("alpha", self.alpha >= 0, "0 or more"),
            ("beta", 0 <= self.beta <= 1, "between 0 and 1"),
            ("divergence", self.divergence in get_args(DivergenceName), f"of {', '.join(get_args(DivergenceName))}"),
            ("skew", 0 < self.skew < 1, "in (0, 1)"),
            ("tau", self.tau > 0, "above 0"),
            ("k", self.k >= 2, "2 or more"),
            ("opener", _is_share(self.opener) or self.opener == "adaptive", "in (0, 1] or 'adaptive'"),
            ("em_ratio", 0 < self.em_ratio <= 1, "in (0, 1]"),
            ("temperature", self.temperature > 0, "above 0"),
            ("indirect_reduction", self.indirect_reduction in ("mean", "sum"), "'mean' or 'sum'"),
            ("direct_weight", self.direct_weight >= 0, "0 or more"),
            ("em_weight", self.em_weight >= 0, "0 or more"),
            ("policy_gradient_weight", self.policy_gradient_weight >= 0, "0 or more"),
            ("released", _among(self.released, RELEASED), f"of {', '.join(RELEASED)}, each once"),
        ):
            if not good:
                raise InputError(f"{name} is {getattr(self, name)}.", f"Choose a value {range_}.")
        if not (self.alpha or self.direct_weight or self.em_weight):
            raise InputError(
                "All three terms have weight 0.", "Give alpha, direct_weight or em_weight a value above 0."
            )
        if "opener" in self.released and self.opener == "adaptive":
            raise InputError(
                "The released opener is one for all responses, not adaptive.", "Give a share, such as 0.1."
            )

        plain = self.formula == Divergence.jsd(1) and not self.gate and self.temperature == 1
        if self.policy_gradient_weight and not (plain and self.direct_weight):
            raise InputError(
                "The long-range term completes the gradient of a reverse KL at every token, at temperature 1.",
                "Give beta 1, no gate, temperature 1 and a direct_weight, or policy_gradient_weight 0.",
            )

    @property
    def formula(self) -> Divergence:
        """The divergence of the direct term."""
        if self.divergence == "jsd":
            return Divergence.jsd(self.beta)
        return (Divergence.skew_kl if self.divergence == "skew-kl" else Divergence.skew_reverse_kl)(self.skew)


def _among(values: tuple[str, ...], known: tuple[str, ...]) -> bool:
    return set(values) <= set(known) and len(set(values)) == len(values)


def _is_share(value: float | str) -> bool:
    return isinstance(value, int | float) and 0 < value <= 1
