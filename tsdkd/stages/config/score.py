"""What each stage can be told, with the defaults the command line shows; loads without torch."""

from dataclasses import dataclass
from typing import Literal

from tsdkd.core.config import TSDKDConfig
from tsdkd.stages.config.types import DType


@dataclass(frozen=True)
class ScoreConfig:
    """What of both models' views is recorded."""

    signal: Literal["hidden", "hidden8", "topk", "ranks"] = "hidden"
    """hidden: exact for any setting; hidden8: the same in int8; topk: a lower bound of the divergence; ranks: no direct
    term."""
    k: int = TSDKDConfig.k
    """Candidates the student proposes at each position."""
    top_k: int = 64
    """Teacher log-probabilities per token with the signal "topk"."""
    batch_tokens: int = 8192
    """Tokens per forward, padding included."""
    dtype: DType = "auto"
    device_map: Literal["one", "auto"] = "one"
    """auto: each model is spread over all of the machine's GPUs, and what they cannot hold over its memory."""
