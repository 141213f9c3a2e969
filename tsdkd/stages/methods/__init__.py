"""The distillation methods, one file each, and their registry `METHODS`. Imports no torch."""

from tsdkd.errors import InputError
from tsdkd.stages.methods import (
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
from tsdkd.stages.methods.method import Method as Method

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD
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


def find_method(name: str) -> Method:
    """The method of that name. Raises InputError, which lists all names, for an unknown one."""
    if name not in METHODS:
        raise InputError(f"Unknown method {name!r}.", f"Choose one of {', '.join(METHODS)}.")
    return METHODS[name]
