"""The engine with two models: speculative (Xu et al. 2025) and teacher-mixed (Gu et al. 2024) responses.

The student samples each token, and the teacher replaces some. Speculative: the teacher samples from its `accept_k` most
likely tokens where the student's is not among them. Teacher-mixed: the teacher samples with probability
`teacher_fraction`, so that tokens come from a mixture of both distributions.

The student drafts a block of tokens, the teacher reads the block in one forward, and the response takes the block up
to its first replaced token. A key of response, position and author decides each draw, so the responses are those of the
definition, independent of the block length and of the batch. An end token of either model ends a response.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.utils import ALL_CACHE_NAMES

from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.batches import batches_by_length, pad_left
from tsdkd.stages.data.randomness import random_integer, random_uniform
from tsdkd.stages.data.requests import AnyRequestBatch, Request, Response
from tsdkd.stages.engines.ends import StopStringFinder, finish_reason
from tsdkd.stages.engines.transformers_engine import has_finite_maximum, nucleus_logits
from tsdkd.stages.models.cache import can_roll_back
from tsdkd.stages.models.language_model import LanguageModel, not_finite_error, position_ids


@dataclass(slots=True)
class PartialResponse:
    """One response while it is sampled."""

    seed: int
    last_id: int
    """The newest token, which neither model has read yet."""
    position: int
    """The position of `last_id` in prompt and response."""
    ids: list[int] = field(default_factory=list)
    replaced: int = 0
    """Tokens that the teacher sampled."""
    finder: StopStringFinder | None = None
    """Of stop strings; None without any."""

    def append(self, token: int) -> None:
        self.ids.append(token)
        if self.finder:
            self.finder.append(token)
        self.last_id = token
        self.position += 1


@dataclass(frozen=True)
class BothModelsEngine:
    """Samples with both models, by `config.policy`."""

    student: LanguageModel
    teacher: LanguageModel
    config: GenerateConfig

    @cached_property
    def _can_roll_back(self) -> bool:
        return all(can_roll_back(model.model.config) for model in (self.student, self.teacher))

    def sample(
        self, batches: Iterator[AnyRequestBatch], advance: Callable[[int], None]
    ) -> Iterator[tuple[AnyRequestBatch, list[Response]]]:
        for batch in batches:
            responses: dict[int, Response] = {}
            lengths = [len(request.prompt_ids) for request in batch.requests]
            for indices in batches_by_length(lengths, size=self.config.batch_size):
                sampled = self.sample_together([batch.requests[i] for i in indices])
                responses.update(zip(indices, sampled, strict=True))
                advance(len(indices))
            yield batch, [responses[i] for i in range(len(batch.requests))]

    def sample_together(self, requests: list[Request]) -> list[Response]:
        """Sample a response for each request, in one padded batch."""
        ids, attention = pad_left([request.prompt_ids for request in requests])
        vocab = min(self.student.vocab, self.teacher.vocab)
        student, teacher = models = [
            CachedModel(model, ids[:, :-1], attention[:, :-1], vocab, can_roll_back=self._can_roll_back)
            for model in (self.student, self.teacher)
        ]
        partials = [
            PartialResponse(request.seed, request.prompt_ids[-1], len(request.prompt_ids) - 1) for request in requests
        ]
        for partial, request in zip(partials if self.config.stop else (), requests, strict=False):
            partial.finder = StopStringFinder(self.config.stop, self.student.tokenizer, request.prompt_ids)
        batch = partials
        with torch.no_grad():
            while unfinished := [i for i, partial in enumerate(batch) if not self._is_finished(partial)]:
                if self._can_roll_back:
                    batch = [batch[i] for i in unfinished]
                    for model in models:
                        model.select(unfinished)
                drafts, teacher_logits = self._draft(batch, student, teacher)
                accepted = [self._accept(partial, drafts[i], teacher_logits[i]) for i, partial in enumerate(batch)]
                for model in models:
                    model.accept(accepted)
        return [
            Response(partial.ids, finish_reason(self.config, ended=self._has_ended(partial)), partial.replaced)
            for partial in partials
        ]

    def _draft(
        self, partials: list[PartialResponse], student: "CachedModel", teacher: "CachedModel"
    ) -> tuple[list[list[int]], Tensor]:
        """The student's next tokens per response, and the teacher's logits (response, draft, vocab) for each.

        A draft never exceeds the limit of a response, since a model may have no positions beyond it.
        """
        tokens = 1
        if self._can_roll_back:
            tokens = min(self.config.draft_tokens, *(self.config.response_limit - len(p.ids) for p in partials))
        blocks = [torch.tensor([[partial.last_id] for partial in partials])]
        positions = torch.tensor([[partial.position] for partial in partials])
        for i in range(tokens):
            logits = student.logits(blocks[-1], positions + i)[:, -1]
            sampled = [self._sample(logits[j], p, len(p.ids) + i, "student") for j, p in enumerate(partials)]
            blocks.append(torch.tensor(sampled).unsqueeze(-1))
        inputs, drafts = torch.cat(blocks[:-1], 1), torch.cat(blocks[1:], 1)
        return drafts.tolist(), teacher.logits(inputs, positions + torch.arange(tokens))

    def _accept(self, partial: PartialResponse, draft: list[int], teacher_logits: Tensor) -> int:
        """Append a draft up to its first replaced token; return how many tokens the response grew by."""
        for i, token in enumerate(draft):
            if self._is_finished(partial):
                return i
            _require_finite_maximum(teacher_logits[i], self.teacher)
            logits = self._replacement_logits(partial, token, teacher_logits[i])
            if logits is not None:
                partial.append(self._sample(logits, partial, len(partial.ids), "teacher"))
                partial.replaced += 1
                return i + 1
            partial.append(token)
        return len(draft)

    def _replacement_logits(self, partial: PartialResponse, token: int, teacher_logits: Tensor) -> Tensor | None:
        """Logits (vocab,) that the teacher samples the next token from; None where the student's token stays."""
        if self.config.policy == "teacher-mixed":
            by_teacher = random_uniform(partial.seed, len(partial.ids), "whose") < self.config.teacher_fraction
            return teacher_logits if by_teacher else None
        best = teacher_logits.topk(min(self.config.accept_k, len(teacher_logits))).indices
        if bool((best == token).any()):
            return None
        return torch.full_like(teacher_logits, -torch.inf).index_copy_(0, best, teacher_logits[best])

    def _is_finished(self, partial: PartialResponse) -> bool:
        return self._has_ended(partial) or len(partial.ids) >= self.config.response_limit

    def _has_ended(self, partial: PartialResponse) -> bool:
        """Whether an end token or a stop string ends the response."""
        if partial.finder and partial.finder.found:
            return True
        return bool(partial.ids) and partial.ids[-1] in self.student.end_ids + self.teacher.end_ids

    def _sample(
        self, logits: Tensor, partial: PartialResponse, index: int, author: Literal["student", "teacher"]
    ) -> int:
        """Sample an id from logits (vocab,) by Gumbel-max, with noise that response, index and author decide."""
        _require_finite_maximum(logits, self.student if author == "student" else self.teacher)
        if self.config.temperature == 0:
            return int(logits.argmax())
        scaled = nucleus_logits(logits.float().unsqueeze(0) / self.config.temperature, self.config.top_p)[0]
        generator = torch.Generator(logits.device).manual_seed(random_integer(partial.seed, index, author))
        return int((scaled - torch.empty_like(scaled).exponential_(generator=generator).log()).argmax())


def _require_finite_maximum(logits: Tensor, language_model: LanguageModel) -> None:
    """Raises NotFiniteError for logits (vocab,) of which the largest is NaN or infinite."""
    if not has_finite_maximum(logits):
        raise not_finite_error(language_model.name, language_model.model.dtype)


class CachedModel:
    """A model with its cache, from which rejected tokens are removed.

    A sliding window counts the cache's columns. So every layer keeps all tokens, those of a response in adjacent
    columns up to the last one, and the attention mask alone applies the window.
    """

    def __init__(
        self, language_model: LanguageModel, ids: Tensor, attention: Tensor, vocab: int, *, can_roll_back: bool
    ) -> None:
        """Read left-padded prompts (batch, seq). Without rollback, `accept` gets every token that was read."""
        self.language_model, self.vocab, self.can_roll_back = language_model, vocab, can_roll_back
        self.cache: dict[str, Any] = {"past_key_values": DynamicCache()} if can_roll_back else {}
        """The model's argument that holds its cache; without rollback, the model makes its own."""
        self.attention = attention[:, :0]
        """Mask (batch, columns) of the cache."""
        self.pending = 0
        """Columns that were added since the last `accept`."""
        with torch.no_grad():
            if ids.shape[1]:
                self._read(ids, attention, position_ids(attention))
                self.attention = attention

    def logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Read new ids at their positions, both (batch, new); return logits (batch, new, vocab)."""
        attention = torch.cat([self.attention, torch.ones(len(ids), self.pending + ids.shape[1], dtype=torch.long)], 1)
        logits = self._read(ids, attention, positions)
        self.pending += ids.shape[1]
        return logits

    def accept(self, counts: list[int]) -> None:
        """Remove the tokens read since the last call, except the first `counts` of each response."""
        accepted = torch.ones(len(counts), self.pending, dtype=torch.long)
        if self.can_roll_back:
            accepted = (torch.arange(self.pending) < torch.tensor(counts).unsqueeze(1)).long()
        self.attention, self.pending = torch.cat([self.attention, accepted], 1), 0
        if not accepted.all():
            # The rejected columns move to the padding before the prompt; columns without any token are dropped.
            columns = self.attention.argsort(dim=1, stable=True)[:, -int(self.attention.sum(1).max()) :]
            self.attention = self.attention.gather(1, columns)
            self._update_cache(lambda values: values.take_along_dim(columns.to(values.device)[:, None, :, None], 2))

    def select(self, responses: list[int]) -> None:
        """Keep these responses of the batch."""
        if len(responses) < len(self.attention):
            self.attention = self.attention[responses]
            self._update_cache(lambda values: values[responses])

    def _update_cache(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change each layer's keys and values (batch, heads, columns, width)."""
        for layer in self.cache["past_key_values"].layers:
            if layer.is_initialized:
                layer.keys, layer.values = change(layer.keys), change(layer.values)

    def _read(self, ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        model, device = self.language_model.model, self.language_model.device
        inputs = model.prepare_inputs_for_generation(
            ids.to(device),
            attention_mask=attention.to(device),
            position_ids=positions.to(device),
            use_cache=True,
            is_first_iteration=self.attention.shape[1] + self.pending == 0,
            **self.cache,
        )
        output = model(**inputs)
        self.cache = {name: output[name] for name in ALL_CACHE_NAMES if name in output}
        logits: Tensor = output.logits[..., : self.vocab]
        return logits
