"""Configuration of `tsdkd inspect`."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from tsdkd.core.config import TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.config.chat import ChatConfig, recorded_chat_options
from tsdkd.stages.config.groups import OBJECTIVE, RESPONSES
from tsdkd.stages.config.objective import OBJECTIVE_OPTIONS
from tsdkd.stages.config.option import nested, option
from tsdkd.stages.config.types import attention_option

RANDOM, LARGEST_GAP, LONGEST_OPENER = "random", "largest-gap", "longest-opener"


def _objective_option(field: str) -> Any:
    """An option of the objective that defaults to the checkpoint's value."""
    declared = OBJECTIVE_OPTIONS[field]
    default = getattr(TSDKDConfig, field)
    return option(
        None,
        declared.help,
        group=OBJECTIVE,
        min_=declared.min,
        max_=declared.max,
        metavar=declared.metavar,
        shown=f"the checkpoint's, else {'on' if default is True else default}",
    )


@dataclass(frozen=True)
class InspectConfig:
    """Which response is shown, and how its tokens are selected."""

    sample_id: str = option(
        RANDOM,
        "Response to show: an id, random, largest-gap or longest-opener.",
        group=RESPONSES,
        metavar="ID",
        common=True,
    )
    """largest-gap: mean student entropy minus mean teacher entropy; longest-opener: in tokens."""
    seed: int = option(0, "Seed of the random choice.", group=RESPONSES, min_=0)
    opener: float | Literal["adaptive"] | None = _objective_option("opener")
    em_ratio: float | None = _objective_option("em_ratio")
    gate: bool | None = _objective_option("gate")
    tau: float | None = _objective_option("tau")
    k: int | None = _objective_option("k")
    attention: str | None = attention_option()
    chat: ChatConfig = nested(ChatConfig, options=recorded_chat_options())
    """That of the rollouts, or unset, which stands for it."""

    def objective(self, recorded: TSDKDConfig, max_k: int | None = None) -> TSDKDConfig:
        """The `recorded` objective with the options given here, and at most `max_k` candidates. Raises InputError."""
        names = ("opener", "em_ratio", "gate", "tau", "k")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if max_k is not None:
            if given.get("k", 0) > max_k:
                raise InputError(f"--k is {given['k']}, but only {max_k} candidates were recorded.", "Lower --k.")
            given.setdefault("k", min(recorded.k, max_k))
        return replace(recorded, **given)
