"""What each stage can be told, with the defaults the command line shows; loads without torch."""

from dataclasses import dataclass, replace
from typing import Literal

from tsdkd.core.config import TSDKDConfig
from tsdkd.errors import InputError

RANDOM, LARGEST_GAP, LONGEST_OPENER = "random", "largest-gap", "longest-opener"


@dataclass(frozen=True)
class InspectConfig:
    """Which response is looked at, and by which rules its tokens count; None: as the checkpoint was trained."""

    sample_id: str = RANDOM
    """An id; or random, largest-gap (mean entropy, student less teacher), longest-opener (tokens)."""
    seed: int = 0
    """Of the random choice."""
    opener: float | Literal["adaptive"] | None = None
    em_ratio: float | None = None
    gate: bool | None = None
    tau: float | None = None
    k: int | None = None

    def objective(self, recorded: TSDKDConfig, most: int | None = None) -> TSDKDConfig:
        """What was `recorded`, with what is given here; no more than `most` candidates. Raises InputError."""
        names = ("opener", "em_ratio", "gate", "tau", "k")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if most is not None:
            if given.get("k", 0) > most:
                raise InputError(f"--k is {given['k']}, but only {most} candidates were recorded.", "Lower --k.")
            given.setdefault("k", min(recorded.k, most))
        return replace(recorded, **given)
