"""The selection of a method during training: what it reads beside the tokens, its state, and a whole step's weights."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel

from tsdkd.core import Features, ResponseContext, TeacherSignal, Weighted, token_features_from_hidden
from tsdkd.core.features import KNOWN_BEFORE
from tsdkd.core.selective_objective import SelectiveObjective
from tsdkd.stages.data.batches import predicted_ids
from tsdkd.stages.data.randomness import random_integer
from tsdkd.stages.data.source import Sample
from tsdkd.stages.methods import Method
from tsdkd.stages.methods.values import Options
from tsdkd.stages.metrics.step_times import timed
from tsdkd.stages.models.language_model import hidden_states, output_head

ResponseKey = tuple[str, int, tuple[int, ...]]
"""Sample, turn and tokens of a response: equal only for equal responses."""


@dataclass
class StepSelection:
    """The selection of one run. Seed, step and response decide its random numbers.

    With scope "batch" it selects from the responses of all micro-batches and ranks at once, in an order that does not
    depend on their division, so every rank has the same weights and the same state.
    """

    method: Method
    options: Options
    seed: int
    state: dict[str, Any] = field(init=False)
    objective: SelectiveObjective = field(init=False)
    _selected: dict[ResponseKey, dict[str, Weighted]] = field(default_factory=dict)
    """The weights (tokens,) of the step's responses."""

    def __post_init__(self) -> None:
        self.state = deepcopy(dict(self.method.state))
        self.objective = self.method.with_losses(self.options)

    @classmethod
    def of_method(cls, method: Method, given: Iterable[str], seed: int) -> "StepSelection | None":
        """The selection of a run with these options; None for a method without losses of its own."""
        return cls(method, method.read_options(given), seed) if method.is_selective else None

    @property
    def of_whole_steps(self) -> bool:
        """Whether it selects once per optimizer step."""
        return self.objective.scope == "batch"

    def read(
        self,
        model: PreTrainedModel,
        vocab: int,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        predicting: Tensor,
        response_mask: Tensor,
        teacher: TeacherSignal | None,
    ) -> dict[str, Tensor]:
        """Run the student's forward; returns the micro-batch's features (tokens,) that the distributions decide.

        `teacher` is None in a batch without samples, which has no features.
        """
        hidden = hidden_states(model, input_ids, attention_mask, position_ids)
        model.get_output_embeddings()(hidden[:, :0])  # FSDP gathers the head's weights when the head is called
        if teacher is None:
            return {}
        ids = predicted_ids({"input_ids": input_ids, "predicting": predicting})
        hidden, head = hidden[predicting], output_head(model, vocab)
        with timed("objective"):
            return token_features_from_hidden(hidden, head, teacher, response_mask, self.objective, ids)

    def inputs(self, responses: Sequence[Sample], mask: Tensor, step: int, steps: int) -> dict[str, Any]:
        """The arguments of the loss for a micro-batch's responses, the rows of the mask."""
        return {"context": self.context(responses, mask, step, steps), "selected": self.selected(responses, mask)}

    def context(self, responses: Sequence[Sample], mask: Tensor, step: int, steps: int) -> ResponseContext:
        """What is known of a micro-batch's responses, the rows of the mask."""
        authors = tuple(response["author"] for response in responses)
        return ResponseContext(self._uniform(responses, mask, step), authors, None, step, steps)

    def selected(self, responses: Sequence[Sample], mask: Tensor) -> dict[str, Weighted] | None:
        """The weights of a micro-batch's responses that `select_step` has selected; None with scope "response"."""
        if not self.of_whole_steps:
            return None
        rows = [self._selected[_key(response)] for response in responses]
        return {
            name: replace(
                rows[0][name],
                weights=_grid([row[name].weights for row in rows], mask),
                temperature=_grid_or_number([row[name].temperature for row in rows], mask),
            )
            for name in self.objective.losses
        }

    def select_step(
        self, batches: Iterable[tuple[Sequence[Sample], Mapping[str, Tensor]]], step: int, steps: int, ranks: int
    ) -> None:
        """Select the weights of all responses of a step. Every rank must call it.

        `batches`: the responses of each micro-batch, and their features (tokens,), row after row.
        """
        own = [row for responses, features in batches for row in _rows(responses, features)]
        rows = [row for rows in (gather_object([own]) if ranks > 1 else [own]) for row in rows]
        rows.sort(key=lambda row: _key(row[0]))
        responses = [response for response, _ in rows]
        lengths = torch.tensor([len(response["response_ids"]) for response in responses])
        mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(-1)
        uniform = self._uniform(responses, mask, step)
        names = [name for name in self.objective.features if name not in KNOWN_BEFORE]
        grids = {name: _grid([values[name] for _, values in rows], mask) for name in names}
        if uniform is not None:
            grids["uniform"] = uniform
        prompt_ids = [response["prompt_id"] for response in responses]
        numbers = {prompt: i for i, prompt in enumerate(sorted(set(prompt_ids)))}
        context = ResponseContext(
            uniform,
            tuple(response["author"] for response in responses),
            torch.tensor([numbers[prompt] for prompt in prompt_ids]),
            step,
            steps,
            self.state,
        )
        weighted = self.objective.weigh(Features(mask, grids, context))
        equal = defaultdict(list)
        for row, response in enumerate(responses):
            equal[_key(response)].append(row)
        self._selected = {
            key: {name: _take_rows(grid, own, int(lengths[own[0]])) for name, grid in weighted.items()}
            for key, own in equal.items()
        }

    def update(self, logs: Mapping[str, float]) -> None:
        """Update the method's state with the means of a step's log entry."""
        self.method.updated(self.state, {name: logs[name] for name in self.objective.losses}, self.options)

    def state_dict(self) -> dict[str, Any]:
        """Raises InputError for a state that cannot be saved."""
        self.method.require_saved_state(self.state)
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state

    def _uniform(self, responses: Sequence[Sample], mask: Tensor, step: int) -> Tensor | None:
        if "uniform" not in self.objective.features:
            return None
        rows = []
        for response in responses:
            key = random_integer(self.seed, step, "uniform", response["sample_id"], response["turn"])
            generator = torch.Generator().manual_seed(key)
            rows.append(torch.rand(len(response["response_ids"]), generator=generator, dtype=torch.float64))
        return _grid(rows, mask)


def _key(response: Sample) -> ResponseKey:
    return response["sample_id"], response["turn"], tuple(response["response_ids"])


def _rows(responses: Sequence[Sample], features: Mapping[str, Tensor]) -> Iterable[tuple[Sample, dict[str, Tensor]]]:
    lengths = [len(response["response_ids"]) for response in responses]
    split = {name: values.cpu().split(lengths) for name, values in features.items()}
    for i, response in enumerate(responses):
        yield response, {name: parts[i] for name, parts in split.items()}


def _grid(rows: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Rows of tokens -> (batch, seq), 0 off the mask."""
    values = torch.cat(list(rows)).to(mask.device)
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _grid_or_number(rows: Sequence[float | Tensor], mask: Tensor) -> float | Tensor:
    first = rows[0]
    if not isinstance(first, Tensor):
        return first
    grid = _grid([row for row in rows if isinstance(row, Tensor)], mask)
    return grid.masked_fill(~mask, 1)


def _take_rows(weighted: Weighted, rows: list[int], length: int) -> Weighted:
    """The mean weights of equal responses, which replays may hold: equal responses have equal losses."""
    temperature = weighted.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature[rows, :length].mean(0)
    return replace(weighted, weights=weighted.weights[rows, :length].mean(0), temperature=temperature)
