"""What each stage can be told, with the defaults the command line shows; loads without torch."""

from dataclasses import dataclass

from tsdkd.stages.config.types import DType


@dataclass(frozen=True)
class PruneConfig:
    """How many layers go, and how they are chosen."""

    drop: int = 1
    limit: int = 8
    """Prompts the choice is made on."""
    max_tokens: int = 256
    """Tokens of each."""
    column: str | None = None
    dtype: DType = "auto"
