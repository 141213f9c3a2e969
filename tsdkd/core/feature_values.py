"""The features of a block of tokens, from both models' distributions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tsdkd.core.distributions import log_probs
from tsdkd.core.features import Features, ResponseContext
from tsdkd.core.losses import Divergence, TokenBlock
from tsdkd.core.metrics import to_grid
from tsdkd.core.ranking import outside_mass
from tsdkd.core.selective_objective import SelectiveObjective
from tsdkd.core.teacher_signals import TeacherSignal, argmax
from tsdkd.errors import InputError


@dataclass(frozen=True)
class FeatureSet:
    """The features to form, with the number k of tokens that some of them depend on."""

    names: tuple[str, ...] = ()
    k: int = 0

    @torch.no_grad()
    def form(self, student_logits: Tensor, teacher: TeacherSignal, ids: Tensor | None) -> dict[str, Tensor]:
        """Logits (n, vocab), the teacher's signal and the response's tokens (n,) -> features (n,), by name.

        Raises InputError for a feature that the signal does not give, and without `ids` for a feature of these tokens.
        """
        if not self.names:
            return {}
        tokens = TokenBlock(log_probs(student_logits), teacher, 1.0, ids)
        return {name: _FORM[name](tokens, self.k).to(tokens.log_q) for name in self.names}


def _divergence(beta: float) -> Callable[[TokenBlock, int], Tensor]:
    return lambda tokens, _: Divergence.jsd(beta).values(tokens)


def _hellinger(tokens: TokenBlock, _: int) -> Tensor:
    difference = (tokens.log_p / 2).exp() - (tokens.log_q / 2).exp()
    return (difference.square().sum(-1) / 2).sqrt()


def _teacher_rank(tokens: TokenBlock, k: int) -> Tensor:
    ids, _ = tokens.teacher.top(k, 1.0)
    found = ids == argmax(tokens.log_q).unsqueeze(-1)
    return torch.cat([found, torch.ones_like(found[:, :1])], -1).int().argmax(-1)


def _topk_agreement(tokens: TokenBlock, k: int) -> Tensor:
    ids, _ = tokens.teacher.top(k, 1.0)
    own = tokens.log_q.topk(k, -1).indices
    return (own.unsqueeze(-1) == ids.unsqueeze(-2)).any(-1).to(tokens.log_q).mean(-1)


def _student_outside_mass(tokens: TokenBlock, k: int) -> Tensor:
    return outside_mass(tokens.log_q.topk(k, -1).values)


def _teacher_outside_mass(tokens: TokenBlock, k: int) -> Tensor:
    return outside_mass(tokens.log_p.gather(-1, tokens.log_q.topk(k, -1).indices))


_FORM: Mapping[str, Callable[[TokenBlock, int], Tensor]] = {
    "student_log_prob": lambda tokens, _: tokens.at_ids(tokens.log_q),
    "teacher_log_prob": lambda tokens, _: tokens.at_ids(tokens.log_p),
    "forward_kl": _divergence(0.0),
    "reverse_kl": _divergence(1.0),
    "jsd": _divergence(0.5),
    "hellinger": _hellinger,
    "teacher_rank": _teacher_rank,
    "topk_agreement": _topk_agreement,
    "student_outside_mass": _student_outside_mass,
    "teacher_outside_mass": _teacher_outside_mass,
}


def feature_set(objective: SelectiveObjective) -> FeatureSet:
    """The features of an objective but the two entropies, which every first pass forms."""
    return FeatureSet(tuple(name for name in objective.features if name in _FORM), objective.k)


def features_of(
    objective: SelectiveObjective, mask: Tensor, values: Mapping[str, Tensor], context: ResponseContext
) -> Features:
    """The declared features of all tokens, from their values (tokens,). Raises InputError without random numbers."""
    grids = {name: to_grid(values[name], mask) for name in objective.features if name in values}
    if "uniform" in objective.features:
        if context.uniform is None or context.uniform.shape != mask.shape:
            raise InputError(
                "The selection reads random numbers.", "Pass ResponseContext(uniform=...) of the mask's shape."
            )
        grids["uniform"] = context.uniform.masked_fill(~mask, 0)
    return Features(mask, grids, context)
