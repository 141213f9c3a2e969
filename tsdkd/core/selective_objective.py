"""An objective of any per-token losses, whose weights a function of the tokens' features decides.

`TSDKDConfig` is the objective of TSD-KD and its relatives; both run through the same passes. It loads without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tsdkd.core.features import FEATURES, FEATURES_OF_K, KNOWN_BEFORE, Features
from tsdkd.core.losses import SIGNALS, Loss, PolicyGradient, Ranking, SignalName, Temperature, TopK, require_at_most
from tsdkd.errors import InputError, nearest

if TYPE_CHECKING:
    from torch import Tensor

Scope = Literal["response", "batch"]
Selected: TypeAlias = "Mapping[str, Tensor | Weighted]"
"""The weights of each loss, by name."""


@dataclass(frozen=True, slots=True)
class Weighted:
    """The tokens' weights in a loss, with its temperature and its factor in the objective."""

    weights: Tensor
    """(batch, seq). The loss of a response is the sum of its tokens' weighted losses, so weights contain the mean."""
    temperature: Temperature = 1.0
    """Divides both models' logits in this loss: a number, or one of each token (batch, seq)."""
    factor: float = 1.0
    """The term's factor in the sum of all terms; its value in the log is without it."""


@dataclass(frozen=True)
class SelectiveObjective:
    """Losses by name, and the selection that gives each token's weight in each of them.

    Raises InputError for no loss, objects that are not losses, unknown features, and features that need a `k`.
    """

    losses: Mapping[str, Loss]
    select: Callable[[Features], Selected]
    """Gives the weights of every loss; zeros where a loss does not apply."""
    features: tuple[str, ...] = ()
    """The features that it reads, of `FEATURES`."""
    k: int = 0
    """The number of tokens that some features depend on."""
    scope: Scope = "response"
    """"response": a response's weights depend on this response alone. "batch": on all responses of the optimizer step,
    which the caller must pass together, or select from beforehand."""

    def __post_init__(self) -> None:
        if not isinstance(self.losses, Mapping) or not self.losses:
            raise InputError("The objective has no losses by name.", "Give a dictionary with at least one.")
        for name, loss in self.losses.items():
            _require_loss(name, loss)
        if unknown := sorted(set(self.features) - FEATURES.keys()):
            raise InputError(f"Unknown feature {unknown[0]!r}.", _feature_remedy(unknown[0]))
        if self.k < 1 and (of_k := [name for name in self.features if name in FEATURES_OF_K]):
            raise InputError(
                f"The feature {of_k[0]} needs a number k of tokens.", "Give k, 1 or more; methods have it in options."
            )

    @property
    def selects_before(self) -> bool:
        """Whether no feature depends on the models, so that the weights are known before the first pass."""
        return set(self.features) <= set(KNOWN_BEFORE)

    @property
    def has_policy_gradient(self) -> bool:
        """Whether a loss is a policy gradient, which holds for tokens that the student samples."""
        return any(isinstance(loss, PolicyGradient) for loss in self.losses.values())

    @property
    def needs(self) -> dict[str, SignalName]:
        """Every loss and feature, in words, with the least signal that it is formed from."""
        return {f"the loss {name}": loss.needs for name, loss in self.losses.items()} | {
            f"the feature {name}": FEATURES[name] for name in self.features
        }

    def require_signal(self, signal: SignalName, ranked: float = inf, top: float = inf) -> None:
        """Raise InputError, which names them, for losses and features that need more than this signal of `SIGNALS`.

        `ranked`: the candidates whose ranks it knows; `top`: the teacher's most likely tokens that it knows.
        """
        if missing := [name for name, least in self.needs.items() if SIGNALS.index(least) > SIGNALS.index(signal)]:
            least = max((self.needs[name] for name in missing), key=SIGNALS.index)
            raise InputError(
                f"The teacher's signal {signal!r} does not give {', '.join(missing)}.",
                f"Score with --signal {least}, or load the teacher.",
            )
        of_top = ("teacher_rank", "topk_agreement")
        counts = {f"the feature {name}": (float(self.k), top) for name in self.features if name in of_top}
        for name, loss in self.losses.items():
            if isinstance(loss, Ranking):
                counts[f"the loss {name}"] = loss.k, ranked
            elif isinstance(loss, TopK) and loss.of == "teacher":
                counts[f"the loss {name}"] = loss.k, top
        for reader, (k, known) in counts.items():
            if k > known:
                raise InputError(
                    f"k is {k:g} in {reader}, but the teacher's signal knows only {known:g} tokens.",
                    "Lower k, or score again with a larger --k or --top-k.",
                )

    def check_vocab(self, vocab: int) -> None:
        """Raise InputError for a k that is too large for the vocabulary."""
        for loss in self.losses.values():
            loss.check_vocab(vocab)
        if any(name in FEATURES_OF_K for name in self.features):
            require_at_most(self.k, vocab)

    def weigh(self, features: Features) -> dict[str, Weighted]:
        """The weights of every loss, checked, 0 off the responses. Raises InputError for weights that do not fit."""
        selected = self.select(features)
        unknown = sorted(selected.keys() - self.losses.keys()) if isinstance(selected, Mapping) else [selected]
        if unknown:
            raise InputError(
                f"The selection gives {unknown[0]!r:.100}, which is no loss.",
                f"Return a dictionary with weights of {', '.join(self.losses)}.",
            )
        at = f"at step {features.step + 1} of {features.steps}"
        if missing := [name for name in self.losses if name not in selected]:
            raise InputError(
                f"The selection gives no weights of {', '.join(missing)} {at}.",
                "Return weights of every loss; zeros where it does not apply.",
            )
        return {name: _checked(name, selected[name], features.mask, at) for name in self.losses}


def _feature_remedy(name: str) -> str:
    return f"The nearest is {nearest(name, FEATURES)!r}; all are {', '.join(FEATURES)}."


def _require_loss(name: str, loss: Any) -> None:
    functions = all(callable(getattr(loss, function, None)) for function in ("values", "check_vocab"))
    if isinstance(loss, type) or not functions or getattr(loss, "needs", None) not in SIGNALS:
        raise InputError(
            f"The loss {name} is {loss!r:.100}, which is no loss.",
            f"Give an object with values, check_vocab and needs, which is one of {', '.join(SIGNALS)}.",
        )


def _checked(name: str, given: Tensor | Weighted, mask: Tensor, at: str) -> Weighted:
    """`at`: the step, in words."""
    import torch

    weighted = given if isinstance(given, Weighted) else Weighted(given)
    weights = _checked_grid(f"weights of {name}", weighted.weights, mask, 0.0, at)
    temperature = weighted.temperature
    if not isinstance(temperature, int | float):
        temperature = _checked_grid(f"temperatures of {name}", temperature, mask, 1.0, at)
    if not bool(((divisors := torch.as_tensor(temperature)) > 0).all() and divisors.isfinite().all()):
        raise InputError(f"A temperature of {name} is not above 0 and finite {at}.", "Give temperatures above 0.")
    if not isinstance(weighted.factor, int | float) or not isfinite(weighted.factor):
        raise InputError(f"The factor of {name} is {weighted.factor!r:.100}.", "Give a finite number.")
    return replace(weighted, weights=weights, temperature=temperature)


def _checked_grid(noun: str, grid: object, mask: Tensor, padding: float, at: str) -> Tensor:
    """The numbers (batch, seq) in float64, without gradient, with `padding` off the responses."""
    import torch

    if not isinstance(grid, torch.Tensor) or grid.shape != mask.shape:
        found = f"has shape {tuple(grid.shape)}" if isinstance(grid, torch.Tensor) else f"is {grid!r:.100}"
        raise InputError(
            f"The selection's tensor of {noun} {found}, and the mask has shape {tuple(mask.shape)}.",
            "Return one number for each token.",
        )
    if not bool(grid[mask].isfinite().all()):
        raise InputError(f"The selection's {noun} are not finite {at}.", "Check its divisions and logarithms.")
    return grid.detach().double().masked_fill(~mask, padding)
