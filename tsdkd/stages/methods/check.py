"""A trial of a method's own functions on made-up responses, before anything is loaded or written."""

import json
from copy import deepcopy

import torch
from torch import Tensor

from tsdkd.core.features import Features, ResponseContext
from tsdkd.core.selective import SelectiveObjective, Weighted
from tsdkd.errors import InputError
from tsdkd.stages.methods.method import Method
from tsdkd.stages.methods.values import Options

LENGTHS = (9, 5, 1, 12)
STEPS = 10
_PROBABILITIES = {"uniform", "hellinger", "total_variation", "student_outside_mass", "teacher_outside_mass"}


def try_method(method: Method, options: Options) -> bool:
    """Call the selection, and the update of a state, on made-up responses. Returns whether a loss has a temperature.

    Raises InputError for a function that fails, weights that do not fit, weights of a response that depend on other
    responses although the scope is a response, and a state that cannot be saved.
    """
    objective = method.with_losses(options)
    state = deepcopy(dict(method.state))
    features = _made_up(objective, state)
    weighted = objective.weigh(features)
    if method.scope == "response":
        _require_independent_rows(method, objective, features, weighted)
    method.updated(state, dict.fromkeys(objective.losses, 1.0), options)
    try:
        saved = json.loads(json.dumps(state))
    except (TypeError, ValueError):
        saved = None
    if saved != state:
        raise InputError(
            f"The state of the method {method.name} holds values that cannot be saved.",
            "Keep numbers, words and lists of them, by words.",
        )
    return any(isinstance(term.temperature, Tensor) or term.temperature != 1 for term in weighted.values())


def _made_up(objective: SelectiveObjective, state: dict[str, object]) -> Features:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(-1)
    grids = {}
    for name in objective.features:
        values = torch.rand(mask.shape, generator=generator, dtype=torch.float64)
        if name.endswith("log_prob"):
            values = values.log()
        elif name == "teacher_rank":
            values = (values * (objective.k + 1)).floor()
        elif name == "topk_agreement":
            values = (values * objective.k).round() / objective.k
        elif name not in _PROBABILITIES:
            values = 3 * values
        grids[name] = values.masked_fill(~mask, 0)
    prompts = torch.arange(len(LENGTHS)) // 2 if objective.scope == "batch" else None
    authors = ("student", "teacher", "student", "given")
    return Features(mask, grids, ResponseContext(grids.get("uniform"), authors, prompts, STEPS // 2, STEPS, state))


def _require_independent_rows(
    method: Method, objective: SelectiveObjective, features: Features, together: dict[str, Weighted]
) -> None:
    context = features.context
    for i, length in enumerate(LENGTHS):
        grids = {name: values[i : i + 1, :length] for name, values in features.values.items()}
        own = ResponseContext(grids.get("uniform"), context.authors[i : i + 1], None, context.step, context.steps)
        alone = objective.weigh(Features(features.mask[i : i + 1, :length], grids, own))
        for name, weighted in together.items():
            pairs = ((weighted.weights, alone[name].weights), (weighted.temperature, alone[name].temperature))
            for grid, row in pairs:
                expected = grid[i : i + 1, :length] if isinstance(grid, Tensor) else torch.as_tensor(grid)
                if not torch.allclose(torch.as_tensor(row).double(), expected.double(), rtol=1e-5, atol=1e-8):
                    raise InputError(
                        f"The method {method.name} gives a response other weights beside other responses.",
                        'Give scope="batch", which selects from all responses of a step at once.',
                    )
