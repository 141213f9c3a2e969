"""Models as lm-eval asks them, on transformers; what vLLM needs of the same is in `answerers_vllm.py`.

lm-eval says neither which answers were cut off at their limit nor which prompts were too long: both are noted here.
Imports lm-eval, so it is imported late.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, cast
from unittest.mock import patch

import torch
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig

from tsdkd.stages.models.load import LanguageModel
from tsdkd.stages.models.sizes import fitting_batch_size, sequence_bytes


class TruncationLog:
    """Where answers went wrong, by prompt. lm-eval knows it as its cache: it hears of every answer as it is made."""

    def __init__(self) -> None:
        self.cut_answers: set[str] = set()
        self.cut_prompts: set[str] = set()
        self.cut: deque[bool] = deque()
        """Whether each of the answers that come next was cut off."""
        self.advance: Callable[[int], None] = lambda _: None
        """The progress bar's, while one is shown."""
        self.measures: Callable[[dict[str, float]], None] = lambda _: None
        """Beside it."""
        self.tells = False
        """Does the engine move the bar? lm-eval moves it when a batch is done, which may be all there is."""

    def add_partial(self, kind: str, request: tuple[str, Any], _: Any) -> None:
        if kind == "generate_until" and self.cut.popleft():
            self.cut_answers.add(request[0])


class TruncationTracking:
    """Mixed into lm-eval's classes: notes what did not fit, and leaves the scorers a known random state."""

    notes: TruncationLog
    max_length: int

    def listen(self) -> None:
        """To be called once."""
        self.notes = TruncationLog()
        cast("Any", self).set_cache_hook(self.notes)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        limit = requests[0].args[1]["max_gen_toks"]
        self._fit({r.args[0]: len(cast("Any", self).tok_encode(r.args[0])) + limit for r in requests}, logits=1)
        answers: list[str] = super().generate_until(requests, disable_tqdm)  # type: ignore[misc]
        random.seed(0)  # IFEval's scorer draws what an instruction leaves open
        return answers

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        lengths = {key[0]: len(context) + len(answer) for key, context, answer in requests}
        self._fit(lengths, logits=max(lengths.values()))
        answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **kwargs)  # type: ignore[misc]
        return answers

    def _fit(self, lengths: dict[str, int], logits: int) -> None:
        """`lengths`: tokens by prompt, its answer included; `logits`: positions of each that are projected."""
        self.notes.cut_prompts |= {prompt for prompt, length in lengths.items() if length > self.max_length}
        self.choose_batch(min(max(lengths.values()), self.max_length), logits)

    def choose_batch(self, longest: int, logits: int) -> None:
        """Called with the longest sequence of the requests that come next."""

    def close(self) -> None:
        """Called when nothing more will be asked."""


class TransformersModel(TruncationTracking, HFLM):
    """lm-eval's class for transformers: greedy whatever the model's own settings say, batches by memory."""

    def __init__(self, language_model: LanguageModel, max_length: int, batch_size: int | None) -> None:
        super().__init__(
            pretrained=language_model.model,
            tokenizer=language_model.tokenizer,
            max_length=max_length,
            softmax_dtype="float32",
        )
        self.listen()
        self._asked, self._wanted_batch = language_model, batch_size
        self._greedy = GenerationConfig(
            eos_token_id=language_model.end_ids,
            pad_token_id=self.tokenizer.pad_token_id,
            suppress_tokens=language_model.padding_ids or None,
            do_sample=False,
        )

    def choose_batch(self, longest: int, logits: int) -> None:
        self.batch_size_per_gpu = self._wanted_batch or _fitting(self._asked, longest, logits)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        # The model's own config (repetition penalty) would fill whatever is unset: it steps aside meanwhile.
        with patch.object(self.model, "generation_config", self._greedy), self._counting():
            output: torch.Tensor = super()._model_generate(context, max_length, stop, **settings)
        answers = output[:, context.shape[1] :]
        ended = torch.isin(answers, torch.tensor(self._asked.end_ids, device=answers.device)).any(1).tolist()
        full = answers.shape[1] >= max_length - context.shape[1]
        self.notes.cut.extend(
            full and not end and not any(word in self.tok_decode(ids) for word in stop)
            for ids, end in zip(answers.tolist(), ended, strict=True)
        )
        return output

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Shows how many tokens the answers at hand have: many answers end at once, and until then the bar stands."""
        tokens = count(1)
        hook = self.model.register_forward_hook(lambda *_: self.notes.measures({"tokens": next(tokens)}))
        try:
            yield
        finally:
            hook.remove()


def _fitting(language_model: LanguageModel, longest: int, logits: int) -> int:
    """Sequences that fit at a time: a power of two that depends on model, machine and lengths alone."""
    config = language_model.model.config
    width = torch.finfo(language_model.model.dtype).bits // 8
    eager = config.get_text_config()._attn_implementation == "eager"  # noqa: SLF001
    weights = sum(parameter.nbytes for parameter in language_model.model.parameters())
    sequence = sequence_bytes(config, width, longest, logits, eager=eager)
    return fitting_batch_size(sequence, weights, language_model.device.type)
