"""Responses that student and teacher write together: speculative (Xu et al. 2025), teacher-mixed (Gu et al. 2024).

The student samples each token. Speculative: where it is not among the teacher's best K, the teacher samples one of
those K in its place. Teacher-mixed: with probability `teacher_fraction` the teacher samples in its place, so that tokens
come from a mixture of both distributions. Token by token that costs a teacher's forward each; here the student drafts
a block, the teacher reads it at once, and the block counts up to its first replaced token.

Every position of every response has random numbers of its own, so that the result is that of the definition, whatever
the length of a draft and whoever shares the batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.batches import batches_by_length, pad_left
from tsdkd.stages.data.randomness import random_integer, random_uniform
from tsdkd.stages.data.requests import AnyRequestBatch, Request, Response
from tsdkd.stages.engines.transformers_engine import nucleus_logits
from tsdkd.stages.models.load import LanguageModel, position_ids
from tsdkd.stages.models.tokenizers import vocab_size


@dataclass(frozen=True)
class BothModelsEngine:
    student: LanguageModel
    teacher: LanguageModel
    config: GenerateConfig

    def sample(
        self, parts: Iterator[AnyRequestBatch], advance: Callable[[int], None]
    ) -> Iterator[tuple[AnyRequestBatch, list[Response]]]:
        for part in parts:
            responses: dict[int, Response] = {}
            for batch in batches_by_length(
                [len(request.prompt_ids) for request in part.requests], size=self.config.batch_size
            ):
                written = self._write([part.requests[i] for i in batch])
                responses.update(zip(batch, written, strict=True))
                advance(len(batch))
            yield part, [responses[i] for i in range(len(part.requests))]

    def _write(self, requests: list[Request]) -> list[Response]:
        ids, attention = pad_left([request.prompt_ids for request in requests])
        vocab = vocab_size(self.student.tokenizer)
        student, teacher = (
            CachedReader(model, ids[:, :-1], attention[:, :-1], vocab) for model in (self.student, self.teacher)
        )
        rows = [
            PartialResponse(request.seed, request.prompt_ids[-1], len(request.prompt_ids) - 1) for request in requests
        ]
        with torch.no_grad():
            while any(not self._done(row) for row in rows):
                drafts, judged = self._draft(rows, student, teacher)
                kept = [self._take(row, drafts[i], judged[i]) for i, row in enumerate(rows)]
                for reader in (student, teacher):
                    reader.keep(kept)
        return [Response(row.ids, row.replaced) for row in rows]

    def _draft(
        self, rows: list["PartialResponse"], student: "CachedReader", teacher: "CachedReader"
    ) -> tuple[list[list[int]], Tensor]:
        """A block of the student's tokens per row, and the teacher's logits (row, draft, vocab) for each of them."""
        last = torch.tensor([[row.last] for row in rows])
        at = torch.tensor([[row.position] for row in rows])
        blocks = [last]
        for i in range(self.config.draft_tokens):
            logits = student.read(blocks[-1], at + i)[:, -1]
            chosen = [self._sample(logits[j], row, len(row.ids) + i, "student") for j, row in enumerate(rows)]
            blocks.append(torch.tensor(chosen).unsqueeze(-1))
        read, drafts = torch.cat(blocks[:-1], 1), torch.cat(blocks[1:], 1)
        return drafts.tolist(), teacher.read(read, at + torch.arange(self.config.draft_tokens))

    def _take(self, row: "PartialResponse", draft: list[int], judged: Tensor) -> int:
        """Add a draft up to its first replaced token; how many of the tokens just read are part of the response."""
        for i, token in enumerate(draft):
            if self._done(row):
                return i
            among = self._teachers_choice(row, token, judged[i])
            if among is not None:
                row.add(self._sample(among, row, len(row.ids), "teacher"))
                row.replaced += 1
                return i + 1
            row.add(token)
        return len(draft)

    def _teachers_choice(self, row: "PartialResponse", token: int, judged: Tensor) -> Tensor | None:
        """What the teacher samples from in place of the student's next token, None where that stays: (vocab,) logits
        of the teacher's -> the same, -inf where it may not choose."""
        if self.config.policy == "teacher-mixed":
            draw = random_uniform(row.seed, len(row.ids), "whose")
            return judged if draw < self.config.teacher_fraction else None
        best = judged.topk(min(self.config.accept_k, len(judged))).indices
        if bool((best == token).any()):
            return None
        return torch.full_like(judged, -torch.inf).index_copy_(0, best, judged[best])

    def _done(self, row: "PartialResponse") -> bool:
        ended = bool(row.ids) and row.ids[-1] in self.student.end_ids
        return ended or len(row.ids) >= self.config.max_new_tokens

    def _sample(self, logits: Tensor, row: "PartialResponse", position: int, who: str) -> int:
        """Gumbel-max with the noise of this response, position and author: logits (vocab,) -> an id."""
        if self.config.temperature == 0:
            return int(logits.argmax())
        scaled = nucleus_logits(logits.float().unsqueeze(0) / self.config.temperature, self.config.top_p)[0]
        generator = torch.Generator(logits.device).manual_seed(random_integer(row.seed, position, who))
        return int((scaled - torch.empty_like(scaled).exponential_(generator=generator).log()).argmax())


@dataclass(slots=True)
class PartialResponse:
    """One response in the making."""

    seed: int
    last: int
    """The newest token, which no model has read yet."""
    position: int
    """Of that token."""
    ids: list[int] = field(default_factory=list)
    replaced: int = 0

    def add(self, token: int) -> None:
        self.ids.append(token)
        self.last = token
        self.position += 1


class CachedReader:
    """A model with what it has read. Columns that turned out wrong stay in its cache, masked."""

    def __init__(self, language_model: LanguageModel, ids: Tensor, attention: Tensor, vocab: int) -> None:
        self.language_model, self.vocab = language_model, vocab
        self.cache = DynamicCache()
        self.attention = attention[:, :0]
        self.pending = 0
        with torch.no_grad():
            if ids.shape[1]:
                self._forward(ids, attention, position_ids(attention))
        self.attention = attention

    def read(self, ids: Tensor, at: Tensor) -> Tensor:
        """New ids and their positions (row, new) -> logits (row, new, vocab)."""
        self.pending += ids.shape[1]
        attention = torch.cat([self.attention, torch.ones(len(ids), self.pending, dtype=torch.long)], 1)
        return self._forward(ids, attention, at)

    def keep(self, counts: list[int]) -> None:
        """Of what was read since the last call, only the first `counts` tokens of each row happened."""
        kept = torch.arange(self.pending).unsqueeze(0) < torch.tensor(counts).unsqueeze(1)
        self.attention = torch.cat([self.attention, kept.long()], 1)
        self.pending = 0

    def _forward(self, ids: Tensor, attention: Tensor, at: Tensor) -> Tensor:
        device = self.language_model.device
        output = self.language_model.model(
            input_ids=ids.to(device),
            attention_mask=attention.to(device),
            position_ids=at.to(device),
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: Tensor = output.logits[..., : self.vocab]
        return logits
