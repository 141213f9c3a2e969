"""The distillation methods, one file each, their registry `METHODS`, and those from elsewhere. Imports no torch."""

from dataclasses import replace

from tsdkd.errors import InputError
from tsdkd.stages.methods import (
    adakd,
    distillm,
    eopd,
    fire_opd,
    gkd,
    iw_opd,
    minillm,
    prune_opd_decay,
    pw_opsd_weights,
    random_kd,
    reopold,
    rethinking_opd_topk,
    reverse_kl,
    se_kd,
    selectkd,
    seqkd,
    skd,
    skew_kl,
    skew_reverse_kl,
    supervised_kd,
    tip,
    todi,
    tropd_loss,
    tsdkd,
    tsdkd_complement,
    tsdkd_released,
)
from tsdkd.stages.methods.method import Method as Method
from tsdkd.stages.methods.origin import installed, is_file_name, load_file, load_installed

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
        todi,
        se_kd,
        random_kd,
        tip,
        selectkd,
        adakd,
        eopd,
        iw_opd,
        fire_opd,
        rethinking_opd_topk,
        pw_opsd_weights,
        prune_opd_decay,
        tropd_loss,
        reopold,
        tsdkd_complement,
    )
}


def find_method(name: str) -> Method:
    """The method of that name: tsdkd's, that of a Python file, or that of an installed package.

    Raises InputError, which lists all names, for an unknown one, and for a file or package without a usable method.
    """
    if name in METHODS:
        return METHODS[name]
    if is_file_name(name):
        method, origin = load_file(name)
    elif name in (others := installed()):
        method, origin = load_installed(others[name])
    else:
        known = ", ".join([*METHODS, *sorted(others)])
        raise InputError(f"Unknown method {name!r}.", f"Choose one of {known}, or name a Python file.")
    if not isinstance(method, Method):
        raise InputError(f"{name} has no METHOD of the class Method.", "docs/write_a_method.md shows one.")
    if method.name in METHODS or (not is_file_name(name) and method.name != name):
        taken = ", as one of tsdkd's" if method.name in METHODS else ""
        entry_point = "" if is_file_name(name) else ", that of its entry point"
        raise InputError(
            f"The method of {name} is named {method.name}{taken}.", f"Give it a name of its own{entry_point}."
        )
    return replace(method, origin=origin)
