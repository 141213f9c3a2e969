"""The objective's hyperparameters, under the paper's symbols; it loads without torch."""

from dataclasses import dataclass
from math import inf
from typing import Literal, get_args

from tsdkd.core.losses import Divergence, Entropy, Loss, PolicyGradient, Ranking
from tsdkd.errors import InputError

ROUNDING = 1e-12
"""Relative tolerance of comparisons with a boundary: 0.07 * 100 is 7.000000000000001 in binary."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-4, 1e4
"""Beyond these temperatures, logits exceed a float32 or no longer differ."""
_TEMPERATURES = f"between {MIN_TEMPERATURE:g} and {MAX_TEMPERATURE:g}"
DivergenceName = Literal["jsd", "skew-kl", "skew-reverse-kl"]
RELEASED = ("ranking", "opener", "entropy")
"""The released code's deviations from the paper.

ranking: the likelihood of the *reversed* ranking. opener: one length for all responses, the number of tokens before
the cumulated entropy of the batch, row after row, reaches the fraction c. entropy: minimised at every token whose
entropy is at least the batch's quantile `em_ratio`, that is on 90 % of the tokens. The last two take means over all
tokens of the batch; a batch is one call of the loss."""


TERMS = {
    "indirect": "alpha",
    "direct": "direct_weight",
    "entropy": "em_weight",
    "policy_gradient": "policy_gradient_weight",
}
"""The terms of the loss, each with the field of `TSDKDConfig` that weights it; log, screen, report use these names."""


@dataclass(frozen=True)
class TSDKDConfig:
    """Hyperparameters of eq. (13), `L = alpha L_Indirect + L_Direct + L_EM`; defaults are Table 10's.

    A weight of 0 switches a term off. `opener=1.0` with `gate=False` is the paper's "no selection" ablation.
    `alpha=0`, `em_weight=0` and `gate=False` leave a divergence at every token.

    Raises InputError for a value out of range and for values that contradict each other.
    """

    alpha: float = 0.1
    """Weight of the indirect term (ranking), eq. (13)."""
    beta: float = 0.9
    """Generalised JSD, eq. (1): 0 is forward KL(teacher || student), 1 is reverse KL."""
    divergence: DivergenceName = "jsd"
    """Divergence of the direct term; `beta` belongs to "jsd", `skew` to the skew KLs."""
    skew: float = 0.1
    """Weight of a skew KL's first distribution in the mixture that is its second; 0.1 in DistiLLM."""
    tau: float = 1.0
    """Sharpness of the uncertainty gate, eq. (11); the paper gives no value, the released code uses 1."""
    gate: bool = True
    """Weight each position's divergence by the gate; False weights all positions alike."""
    k: int = 10
    """Candidates the student proposes at each opener position."""
    opener: float | Literal["adaptive"] = 0.1
    """Fraction c of the response's entropy that the opener holds, or "adaptive" (Algorithm 2)."""
    em_ratio: float = 0.1
    """Fraction of positions, those with the highest entropy, on which entropy is minimised, eq. (12)."""
    temperature: float = 1.0
    """Divides both models' logits before every softmax."""
    indirect_reduction: Literal["mean", "sum"] = "mean"
    """Over the opener's positions: "sum" is eq. (5) as printed, "mean" is the form that alpha = 0.1 was tuned with."""
    direct_weight: float = 1.0
    """Weight of the direct term (divergence); 1 in the paper."""
    em_weight: float = 1.0
    """Weight of the entropy term; 1 in the paper."""
    policy_gradient_weight: float = 0.0
    """Weight of MiniLLM's policy gradient, 1 in MiniLLM; above 0 the direct term gets importance weights too."""
    released: tuple[str, ...] = ()
    """Deviations of the released code that apply, of `RELEASED`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "released", tuple(self.released))  # JSON has no tuples
        for name, good, range_ in (
            ("alpha", 0 <= self.alpha < inf, "0 or more"),
            ("beta", 0 <= self.beta <= 1, "between 0 and 1"),
            ("divergence", self.divergence in get_args(DivergenceName), f"of {', '.join(get_args(DivergenceName))}"),
            ("skew", 0 < self.skew < 1, "in (0, 1)"),
            ("tau", 0 < self.tau < inf, "above 0"),
            ("k", self.k >= 2, "2 or more"),
            ("opener", _is_fraction(self.opener) or self.opener == "adaptive", "in (0, 1] or 'adaptive'"),
            ("em_ratio", 0 < self.em_ratio <= 1, "in (0, 1]"),
            ("temperature", MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE, _TEMPERATURES),
            ("indirect_reduction", self.indirect_reduction in ("mean", "sum"), "'mean' or 'sum'"),
            ("direct_weight", 0 <= self.direct_weight < inf, "0 or more"),
            ("em_weight", 0 <= self.em_weight < inf, "0 or more"),
            ("policy_gradient_weight", 0 <= self.policy_gradient_weight < inf, "0 or more"),
            ("released", _distinct_and_among(self.released, RELEASED), f"of {', '.join(RELEASED)}, each once"),
        ):
            if not good:
                raise InputError(f"{name} is {getattr(self, name)}.", f"Choose a value {range_}.")
        if not (self.alpha or self.direct_weight or self.em_weight):
            raise InputError(
                "All three terms have weight 0.", "Give alpha, direct_weight or em_weight a value above 0."
            )
        if "opener" in self.released and self.opener == "adaptive":
            raise InputError(
                "The released opener is one for all responses, not adaptive.", "Give a fraction, such as 0.1."
            )

        plain = self.formula == Divergence.jsd(1) and not self.gate and self.temperature == 1
        if self.policy_gradient_weight and not (plain and self.direct_weight):
            raise InputError(
                "The policy gradient completes the gradient of a reverse KL at every token, at temperature 1.",
                "Give beta 1, no gate, temperature 1 and a direct_weight, or policy_gradient_weight 0.",
            )

    @property
    def losses(self) -> dict[str, Loss]:
        """The losses of all terms but the direct one, by name."""
        losses: dict[str, tuple[float, Loss]] = {
            "indirect": (self.alpha, Ranking(self.k, released="ranking" in self.released)),
            "entropy": (self.em_weight, Entropy()),
            "policy_gradient": (self.policy_gradient_weight, PolicyGradient()),
        }
        return {name: loss for name, (weight, loss) in losses.items() if weight}

    def check_vocab(self, vocab: int) -> None:
        """Raise InputError for a k that is too large for the vocabulary."""
        for loss in self.losses.values():
            loss.check_vocab(vocab)

    @property
    def formula(self) -> Divergence:
        """The divergence of the direct term."""
        if self.divergence == "jsd":
            return Divergence.jsd(self.beta)
        return (Divergence.skew_kl if self.divergence == "skew-kl" else Divergence.skew_reverse_kl)(self.skew)


def _distinct_and_among(values: tuple[str, ...], known: tuple[str, ...]) -> bool:
    return set(values) <= set(known) and len(set(values)) == len(values)


def _is_fraction(value: float | str) -> bool:
    return isinstance(value, int | float) and 0 < value <= 1
