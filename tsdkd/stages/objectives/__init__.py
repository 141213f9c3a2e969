"""The objectives by name, a file each; loads without torch."""

from tsdkd.errors import InputError
from tsdkd.stages.objectives import (
    distillm,
    gkd,
    minillm,
    reverse_kl,
    seqkd,
    skd,
    skew_kl,
    skew_reverse_kl,
    supervised_kd,
    tsdkd,
    tsdkd_released,
)
from tsdkd.stages.objectives.objective import Objective as Objective

OBJECTIVES: dict[str, Objective] = {
    module.OBJECTIVE.name: module.OBJECTIVE
    for module in (
        tsdkd,
        tsdkd_released,
        seqkd,
        supervised_kd,
        gkd,
        reverse_kl,
        skew_kl,
        skew_reverse_kl,
        distillm,
        skd,
        minillm,
    )
}


def find(name: str) -> Objective:
    """Raises InputError, with all names, where there is none of that name."""
    if name not in OBJECTIVES:
        raise InputError(f"There is no objective {name!r}.", f"Choose one of {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[name]
