"""A trial of a method's own functions on made-up responses, before anything is loaded or written."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from tsdkd.core.features import Features, ResponseContext
from tsdkd.core.losses import Loss, TokenBlock
from tsdkd.core.selective_objective import SelectiveObjective, Weighted
from tsdkd.core.teacher_signals import TeacherLogits
from tsdkd.errors import InputError
from tsdkd.stages.methods.method import Method
from tsdkd.stages.methods.values import Options

LENGTHS = (9, 5, 1, 12)
STEPS = 10
TRIED_STEPS = (0, 5, 9)
TOKENS, VOCAB = 3, 4096
_PROBABILITIES = {"uniform", "hellinger", "student_outside_mass", "teacher_outside_mass"}


def try_method(method: Method, options: Options) -> bool:
    """Call the losses, the selection and the update of a state on made-up responses, in some steps of a run.

    Returns whether a loss has a temperature. Raises InputError for a function that fails, values and weights that do
    not fit, a token's loss that depends on other tokens, weights of a response that depend on other responses although
    the scope is a response, and a state that cannot be saved.
    """
    objective = method.with_losses(options)
    _try_losses(method, objective)
    state = deepcopy(dict(method.state))
    tempered = False
    for step in TRIED_STEPS:
        features = _made_up(objective, method.authors_with(options), step, state)
        weighted = objective.weigh(features)
        tempered |= any(isinstance(term.temperature, Tensor) or term.temperature != 1 for term in weighted.values())
        if method.scope == "response":
            _require_independent_rows(method, objective, features, weighted)
        method.updated(state, dict.fromkeys(objective.losses, 1.0), options)
    method.require_saved_state(state)
    return tempered


def _try_losses(method: Method, objective: SelectiveObjective) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, TOKENS, VOCAB, generator=generator, dtype=torch.float64)
    for name, loss in objective.losses.items():
        try:
            loss.check_vocab(VOCAB)
        except InputError:  # the vocabulary of the models decides
            continue
        log_q = logits.log_softmax(-1).requires_grad_()
        block = TokenBlock(log_q, TeacherLogits(teacher), ids=torch.arange(TOKENS))
        values = _loss_values(method, name, loss, block)
        if not isinstance(values, Tensor) or values.shape != (TOKENS,) or not values.requires_grad:
            raise InputError(
                f"The loss {name} of the method {method.name} has no differentiable value of each token.",
                "Form a tensor (tokens,) of tokens.log_q (tokens, vocab).",
            )
        first = TokenBlock(log_q[:1], TeacherLogits(teacher[:1]), ids=torch.arange(1))
        if not torch.allclose(_loss_values(method, name, loss, first), values[:1]):
            raise InputError(
                f"The loss {name} of the method {method.name} gives a token another value beside other tokens.",
                "Form each token's loss of its own row; compare tokens in `select`.",
            )


def _loss_values(method: Method, name: str, loss: Loss, tokens: TokenBlock) -> Any:
    return method.call(f"values of {name}", lambda: loss.values(tokens))


def _made_up(objective: SelectiveObjective, authors: tuple[str, ...], step: int, state: dict[str, object]) -> Features:
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
    own = tuple(authors[i % len(authors)] for i in range(len(LENGTHS)))
    return Features(mask, grids, ResponseContext(grids.get("uniform"), own, prompts, step, STEPS, state))


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
