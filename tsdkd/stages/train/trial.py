"""The trial of a method before a run. It loads torch, but neither transformers nor peft."""

from typing import NamedTuple

from tsdkd.core.config import TSDKDConfig
from tsdkd.core.selective_objective import SelectiveObjective
from tsdkd.errors import InputError
from tsdkd.stages.config.train import TrainConfig
from tsdkd.stages.methods import find_method
from tsdkd.stages.methods.check import try_method
from tsdkd.stages.metrics.names import require_term_names


class TriedObjective(NamedTuple):
    """The objective of a run; a method's own losses have been tried on made-up responses."""

    objective: TSDKDConfig | SelectiveObjective
    tempered: bool
    """Whether its own losses have another temperature than 1."""


def try_objective(config: TrainConfig) -> TriedObjective:
    """The objective of a configuration. Raises InputError for a method that fails on made-up responses."""
    method = find_method(config.method)
    if not method.is_selective:
        return TriedObjective(config.objective, tempered=False)
    if config.compile:
        raise InputError(f"--compile does not apply to {method.name}, which has losses of its own.", "Leave it out.")
    options = method.read_options(config.method_options)
    objective = method.with_losses(options)
    require_term_names(objective.losses)
    return TriedObjective(objective, try_method(method, options))
