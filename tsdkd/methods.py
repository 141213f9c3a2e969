"""The names that a method of your own is written with: docs/write_a_method.md. It loads without torch.

`METHOD = Method(...)` in a Python file makes the file a value of `tsdkd train --method`.
"""

from tsdkd.core.config import TSDKDConfig
from tsdkd.core.features import Features
from tsdkd.core.losses import Divergence, Entropy, Loss, PolicyGradient, Ranking, ToDi, TokenBlock, TopK
from tsdkd.core.selective_objective import Selected, Weighted
from tsdkd.stages.methods.method import Method
from tsdkd.stages.methods.values import Options

__all__ = [
    "Divergence",
    "Entropy",
    "Features",
    "Loss",
    "Method",
    "Options",
    "PolicyGradient",
    "Ranking",
    "Selected",
    "TSDKDConfig",
    "ToDi",
    "TokenBlock",
    "TopK",
    "Weighted",
]
