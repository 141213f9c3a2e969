"""What the passes compute of an objective: its features, its losses, and the weights of their tokens."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from tsdkd.core.config import TERMS, TSDKDConfig
from tsdkd.core.feature_values import FeatureSet, feature_set, features_of
from tsdkd.core.features import ResponseContext
from tsdkd.core.losses import Divergence, Loss, Ranking, Temperature
from tsdkd.core.metrics import RankedTokens, loss_metrics, selective_metrics, to_grid
from tsdkd.core.policy_gradient import SampledTokens, mean_future_rewards
from tsdkd.core.selection import OpenerFraction, gated_weights, mean_weights, select_tokens
from tsdkd.core.selective_objective import SelectiveObjective, Weighted
from tsdkd.core.token_comparison import TokenValues

FIRST_PASS_FRACTION = 0.5
"""If more than this fraction of the tokens has a weight, the first pass accumulates a divergence's gradient, at all
tokens. Otherwise the second pass does, at tokens with a weight, whose logits it forms again."""


class TermWeights(NamedTuple):
    """The tokens' weights in a term, which contain the mean over the batch's responses."""

    weights: Tensor
    """(tokens,)"""
    temperature: Temperature = 1.0
    """A number, or one of each token (tokens,)."""
    factor: float = 1.0


class PassTerms:
    """An objective, as the passes compute it. This one has no terms and no features."""

    temperature: float = 1.0
    """That of the first pass, and of terms without a temperature of their own."""
    first: tuple[str, Divergence] | None = None
    """The term whose gradient the first pass accumulates."""
    second: Mapping[str, Loss] = MappingProxyType({})
    """The terms of the second pass."""
    order: tuple[str, ...] = ()
    """The names of all terms, in the order of their sum."""
    features: FeatureSet = FeatureSet()
    """The features that the first pass forms."""
    importance: SampledTokens | None = None
    """The tokens with their sampling probabilities, if the first term has importance weights."""
    ids: Tensor | None = None
    """The response's tokens (tokens,)."""
    k: int = 1
    """The greatest number of candidates that a term ranks."""

    def first_weights(self, values: TokenValues, tokens: slice) -> TermWeights:
        """The weights of some tokens in the first term, from their values."""
        return TermWeights(torch.zeros_like(values.student_entropy))

    def second_weights(
        self, values: TokenValues, features: Mapping[str, Tensor], first: Tensor
    ) -> dict[str, TermWeights]:
        """The weights of all tokens in each term of the second pass; `first` (tokens,): those in the first term."""
        return {}

    def metrics(
        self,
        terms: dict[str, Tensor],
        values: TokenValues,
        weights: Mapping[str, TermWeights],
        ranked: Mapping[str, RankedTokens],
    ) -> dict[str, Tensor]:
        """The metrics of `token_selective_loss`, from the unweighted terms, and the ranked tokens by term."""
        return dict(terms)


class ConfigTerms(PassTerms):
    """A `TSDKDConfig`: the first pass weights the direct term by a token's own two entropies."""

    def __init__(
        self,
        config: TSDKDConfig,
        mask: Tensor,
        sampled: SampledTokens | None,
        opener_fraction: OpenerFraction | None,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.mask, self.opener_fraction = config, mask, opener_fraction
        self.temperature = config.temperature
        self.importance, self.k = sampled, config.k
        self.ids = None if sampled is None else sampled.ids
        self.features = FeatureSet()
        self.first = ("direct", config.formula) if config.direct_weight else None
        self.second = config.losses
        self.order = tuple(name for name in TERMS if name in self.second or (name == "direct" and self.first))
        self._inverse_length = mean_weights(mask)[mask].to(dtype)
        self._gates: list[Tensor] = []

    def first_weights(self, values: TokenValues, tokens: slice) -> TermWeights:
        entropies = values.student_entropy, values.teacher_entropy
        weights, gate = gated_weights(*entropies, self._inverse_length[tokens], self.config)
        self._gates.append(gate)
        weights = weights / len(self.mask) * values.importance
        return TermWeights(weights, self.temperature, self.config.direct_weight)

    def second_weights(
        self, values: TokenValues, features: Mapping[str, Tensor], first: Tensor
    ) -> dict[str, TermWeights]:
        config, mask = self.config, self.mask
        entropies = to_grid(values.student_entropy, mask), to_grid(values.teacher_entropy, mask)
        indirect, entropy = select_tokens(*entropies, mask, config, self.opener_fraction)
        self._opener = indirect > 0
        weights = {"indirect": indirect[mask] / len(mask), "entropy": entropy[mask] / len(mask)}
        if config.policy_gradient_weight:
            future = mean_future_rewards(to_grid(values.reward, mask), mask)
            weights["policy_gradient"] = first * future[mask]
        return {
            name: TermWeights(weights[name], self.temperature, getattr(config, TERMS[name])) for name in self.second
        }

    def metrics(
        self,
        terms: dict[str, Tensor],
        values: TokenValues,
        weights: Mapping[str, TermWeights],
        ranked: Mapping[str, RankedTokens],
    ) -> dict[str, Tensor]:
        means = _means(values) | {"gate": torch.cat(self._gates)}
        return loss_metrics(terms, means, self.mask, self._opener, ranked.get("indirect")) | {
            "opener_length": self._opener.sum() / len(self.mask)
        }


class FeatureTerms(PassTerms):
    """The features of an objective, without its losses: one first pass forms them."""

    def __init__(self, objective: SelectiveObjective, ids: Tensor | None) -> None:
        self.features, self.ids = feature_set(objective), ids


class SelectiveTerms(PassTerms):
    """A `SelectiveObjective`. If its weights are known before the first pass, that pass can accumulate a divergence."""

    def __init__(
        self,
        objective: SelectiveObjective,
        mask: Tensor,
        ids: Tensor | None,
        context: ResponseContext,
        selected: Mapping[str, Weighted] | None,
        dtype: torch.dtype,
    ) -> None:
        """`selected`: the weights, checked, if they were selected beforehand."""
        self.objective, self.mask, self.context, self.dtype = objective, mask, context, dtype
        self.ids = ids
        self.k = max((loss.k for loss in objective.losses.values() if isinstance(loss, Ranking)), default=1)
        if selected is None and objective.selects_before:
            selected = objective.weigh(features_of(objective, mask, {}, context))
        self._selected = None if selected is None else by_token(selected, mask, dtype)
        self.features = FeatureSet() if self._selected else feature_set(objective)
        self.first = self._first_term()
        self.second = {name: loss for name, loss in objective.losses.items() if not self._is_first(name)}
        self.order = tuple(objective.losses)

    def _first_term(self) -> tuple[str, Divergence] | None:
        for name, term in (self._selected or {}).items():
            loss = self.objective.losses[name]
            plain = not isinstance(term.temperature, Tensor) and term.temperature == self.temperature
            mostly = int(term.weights.count_nonzero()) > FIRST_PASS_FRACTION * len(term.weights)
            if isinstance(loss, Divergence) and plain and mostly:
                return name, loss
        return None

    def _is_first(self, name: str) -> bool:
        return self.first is not None and name == self.first[0]

    def first_weights(self, values: TokenValues, tokens: slice) -> TermWeights:
        if self.first is None or self._selected is None:
            return super().first_weights(values, tokens)
        term = self._selected[self.first[0]]
        return term._replace(weights=term.weights[tokens])

    def second_weights(
        self, values: TokenValues, features: Mapping[str, Tensor], first: Tensor
    ) -> dict[str, TermWeights]:
        if self._selected is None:
            entropies = {"student_entropy": values.student_entropy, "teacher_entropy": values.teacher_entropy}
            found = features_of(self.objective, self.mask, {**entropies, **features}, self.context)
            self._selected = by_token(self.objective.weigh(found), self.mask, self.dtype)
        return {name: self._selected[name] for name in self.second}

    def metrics(
        self,
        terms: dict[str, Tensor],
        values: TokenValues,
        weights: Mapping[str, TermWeights],
        ranked: Mapping[str, RankedTokens],
    ) -> dict[str, Tensor]:
        grids = {name: to_grid(weights[name].weights != 0, self.mask) for name in self.order}
        return selective_metrics(terms, _means(values), grids, self.mask, ranked)


def by_token(selected: Mapping[str, Weighted], mask: Tensor, dtype: torch.dtype) -> dict[str, TermWeights]:
    """The weights of tokens (batch, seq) -> (tokens,), with the mean over responses."""
    found = {}
    for name, weighted in selected.items():
        temperature = weighted.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature[mask].to(dtype)
        found[name] = TermWeights((weighted.weights[mask] / len(mask)).to(dtype), temperature, weighted.factor)
    return found


def _means(values: TokenValues) -> dict[str, Tensor | None]:
    return {
        "student_entropy": values.student_entropy,
        "teacher_entropy": values.teacher_entropy,
        "top1_agreement": values.top1_agreement,
    }
