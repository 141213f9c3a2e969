"""The transformers engine: a model in this process that samples with `generate`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TopPLogitsWarper,
)

from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.batches import Ids, batches_by_length, pad_left
from tsdkd.stages.data.requests import AnyRequestBatch, Request, Response
from tsdkd.stages.engines.ends import StopStringFinder, finish_reason
from tsdkd.stages.models.language_model import LanguageModel, not_finite_error


@dataclass(frozen=True)
class TransformersEngine:
    """Samples each batch under the seed of its first request."""

    language_model: LanguageModel
    config: GenerateConfig

    def sample(
        self, batches: Iterator[AnyRequestBatch], advance: Callable[[int], None]
    ) -> Iterator[tuple[AnyRequestBatch, list[Response]]]:
        for batch in batches:
            yield batch, self._responses(batch.requests, advance)

    def _responses(self, requests: list[Request], advance: Callable[[int], None]) -> list[Response]:
        torch.manual_seed(requests[0].seed)
        config, responses = self.config, dict[int, Response]()
        for indices in batches_by_length([len(request.prompt_ids) for request in requests], size=config.batch_size):
            prompts = [requests[i].prompt_ids for i in indices]
            finders = [
                StopStringFinder(config.stop, self.language_model.tokenizer, prompt)
                for prompt in (prompts if config.stop else ())
            ]
            sampled = sample_responses(
                self.language_model, prompts, config.response_limit, config.temperature, config.top_p, finders
            )
            stopped = [finder.found for finder in finders] or [False] * len(prompts)
            for i, ids, found in zip(indices, sampled, stopped, strict=True):
                ended = found or ids[-1] in self.language_model.end_ids
                responses[i] = Response(ids, finish_reason(config, ended=ended))
            advance(len(indices))
        return [responses[i] for i in range(len(requests))]


def sample_responses(
    language_model: LanguageModel,
    prompts: Sequence[Ids],
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    finders: Sequence[StopStringFinder] = (),
) -> list[list[int]]:
    """Sample one response per prompt, with its end token; temperature 0 is greedy. Uses torch's global random state.

    `finders`: of stop strings, one per prompt, before its first token; none without stop strings. Raises NotFiniteError
    for logits that are not finite.
    """
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=language_model.end_ids or None,
        pad_token_id=next(iter(language_model.end_ids), 0),
        suppress_tokens=language_model.padding_ids or None,
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}),
    )
    ids, attention = pad_left(prompts)
    device = language_model.device
    with torch.no_grad(), replaced_generation_config(language_model.model, settings):
        output = language_model.model.generate(
            input_ids=ids.to(device),
            attention_mask=attention.to(device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([FiniteLogits(language_model, language_model.end_ids)]),
            stopping_criteria=StoppingCriteriaList([StopStringCriteria(finders)] if finders else []),
        )
    lengths = [finder.length for finder in finders] or [max_new_tokens] * len(prompts)
    rows = output[:, ids.shape[1] :].tolist()
    return [_through_end_token(row[:n], language_model.end_ids) for row, n in zip(rows, lengths, strict=True)]


class FiniteLogits(LogitsProcessor):
    """Raises NotFiniteError where the largest logit of a response that goes on is NaN or infinite."""

    def __init__(self, language_model: LanguageModel, end_ids: Sequence[int]) -> None:
        self.language_model = language_model
        self.end_ids = torch.tensor(end_ids, dtype=torch.long, device=language_model.device)
        self.ended: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Ids (batch, seq) and logits (batch, vocab) -> the logits."""
        newest = torch.isin(input_ids[:, -1], self.end_ids)
        # The first call's newest token belongs to the prompt.
        self.ended = torch.zeros_like(newest) if self.ended is None else self.ended | newest
        if not (has_finite_maximum(scores) | self.ended).all():
            raise not_finite_error(self.language_model.name, self.language_model.model.dtype)
        return scores


def has_finite_maximum(logits: Tensor) -> Tensor:
    """Whether the largest logit of each token is finite: (..., vocab) -> (...). Impossible tokens have -inf."""
    return logits.amax(-1).isfinite()  # the maximum with NaN is NaN


class StopStringCriteria(StoppingCriteria):
    """Ends each response of a batch at its own stop string."""

    def __init__(self, finders: Sequence[StopStringFinder]) -> None:
        self.finders = finders

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Ids (batch, seq) with one new token each -> whether each response has ended (batch,)."""
        newest = input_ids[:, -1].tolist()
        found = [finder.append(token) for finder, token in zip(self.finders, newest, strict=True)]
        return torch.tensor(found, device=input_ids.device)


@contextmanager
def replaced_generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Give a model another generation config inside the context, and restore the original afterwards.

    `generate` fills each setting that its caller leaves unset (top-k, repetition penalty) from the model's config.
    """
    original = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = original


def nucleus_logits(logits: Tensor, top_p: float) -> Tensor:
    """Logits (..., vocab) with -inf outside the nucleus: the most likely tokens that hold the probability `top_p`."""
    inside: Tensor = logits if top_p >= 1 else TopPLogitsWarper(top_p)(None, logits)
    return inside


def _through_end_token(ids: list[int], end_ids: list[int]) -> list[int]:
    """Ids up to and including the first end token."""
    end = next((i for i, token in enumerate(ids) if token in end_ids), len(ids))
    return ids[: end + 1]
