"""The objective of TSD-KD as a library: tensors in, tensors out; it knows no files, no models, no command line.

Shapes: batch, seq, vocab, k. Logits are aligned to the response positions that they predict. Entropies and divergences
are in nats. Masks are True at response tokens. Equation numbers are those of the paper (ICLR 2026).

Names load on first use, so that importing `TSDKDConfig`, which the command line needs, does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tsdkd.core.adaptive_opener import AdaptiveOpener as AdaptiveOpener
    from tsdkd.core.chunked import token_features_from_hidden as token_features_from_hidden
    from tsdkd.core.chunked import token_selective_loss_from_hidden as token_selective_loss_from_hidden
    from tsdkd.core.chunked import tsdkd_loss_from_hidden as tsdkd_loss_from_hidden
    from tsdkd.core.config import TSDKDConfig as TSDKDConfig
    from tsdkd.core.distributions import entropy as entropy
    from tsdkd.core.distributions import generalized_jsd as generalized_jsd
    from tsdkd.core.features import Features as Features
    from tsdkd.core.features import ResponseContext as ResponseContext
    from tsdkd.core.lm_head import Head as Head
    from tsdkd.core.losses import Divergence as Divergence
    from tsdkd.core.losses import Entropy as Entropy
    from tsdkd.core.losses import Loss as Loss
    from tsdkd.core.losses import PolicyGradient as PolicyGradient
    from tsdkd.core.losses import Ranking as Ranking
    from tsdkd.core.losses import ToDi as ToDi
    from tsdkd.core.losses import TokenBlock as TokenBlock
    from tsdkd.core.losses import TopK as TopK
    from tsdkd.core.objective import token_selective_loss as token_selective_loss
    from tsdkd.core.objective import tsdkd_loss as tsdkd_loss
    from tsdkd.core.policy_gradient import SampledTokens as SampledTokens
    from tsdkd.core.ranking import plackett_luce_nll as plackett_luce_nll
    from tsdkd.core.ranking import ranking_nll as ranking_nll
    from tsdkd.core.recorded_signals import TeacherRanks as TeacherRanks
    from tsdkd.core.recorded_signals import TeacherTokens as TeacherTokens
    from tsdkd.core.recorded_signals import TeacherTopK as TeacherTopK
    from tsdkd.core.selection import TokenWeights as TokenWeights
    from tsdkd.core.selection import opener_mask as opener_mask
    from tsdkd.core.selection import select as select
    from tsdkd.core.selection import top_entropy_mask as top_entropy_mask
    from tsdkd.core.selection import uncertainty_gate as uncertainty_gate
    from tsdkd.core.selective_objective import SelectiveObjective as SelectiveObjective
    from tsdkd.core.selective_objective import Weighted as Weighted
    from tsdkd.core.several_teachers import SeveralTeachers as SeveralTeachers
    from tsdkd.core.teacher_signals import TeacherHidden as TeacherHidden
    from tsdkd.core.teacher_signals import TeacherLogits as TeacherLogits
    from tsdkd.core.teacher_signals import TeacherSignal as TeacherSignal

_NAMES = {
    "adaptive_opener": ["AdaptiveOpener"],
    "chunked": ["token_features_from_hidden", "token_selective_loss_from_hidden", "tsdkd_loss_from_hidden"],
    "config": ["TSDKDConfig"],
    "features": ["Features", "ResponseContext"],
    "losses": ["Divergence", "Entropy", "Loss", "PolicyGradient", "Ranking", "TokenBlock", "TopK", "ToDi"],
    "selective_objective": ["SelectiveObjective", "Weighted"],
    "distributions": ["entropy", "generalized_jsd"],
    "lm_head": ["Head"],
    "policy_gradient": ["SampledTokens"],
    "objective": ["token_selective_loss", "tsdkd_loss"],
    "ranking": ["plackett_luce_nll", "ranking_nll"],
    "selection": ["TokenWeights", "opener_mask", "select", "top_entropy_mask", "uncertainty_gate"],
    "recorded_signals": ["TeacherRanks", "TeacherTokens", "TeacherTopK"],
    "several_teachers": ["SeveralTeachers"],
    "teacher_signals": ["TeacherHidden", "TeacherLogits", "TeacherSignal"],
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_MODULES)
