"""The transformers model that lm-eval evaluates. Imports lm-eval, so other modules import it late."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, groupby
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from tsdkd.stages.data.thoughts import THOUGHT_MARKERS
from tsdkd.stages.engines.transformers_engine import FiniteLogits
from tsdkd.stages.eval.response_tracking import ResponseTracking
from tsdkd.stages.eval.seeded_sampling import SeededSampling
from tsdkd.stages.models.attributes import replaced_attribute
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.model_size import fitting_batch_size, model_size


class TransformersModel(ResponseTracking, HFLM):
    """lm-eval's class for transformers. Its greedy decoding samples with `SeededSampling`; the memory decides the batch
    size."""

    def __init__(
        self, language_model: LanguageModel, max_length: int, batch_size: int | None, turn_end_ids: list[int]
    ) -> None:
        """`turn_end_ids`: ids that end a response besides the model's own."""
        tokenizer = language_model.tokenizer
        if tokenizer.pad_token_id not in range(language_model.vocab):  # lm-eval would add a token without a row
            tokenizer.pad_token_id = next(iter(language_model.end_ids), 0)
        super().__init__(
            pretrained=language_model.model,
            tokenizer=tokenizer,
            max_length=max_length,
            softmax_dtype="float32",
        )
        self.start_tracking(language_model.name, language_model.vocab, str(language_model.model.dtype))
        self._language_model, self._fixed_batch_size = language_model, batch_size
        self._end_ids = sorted({*language_model.end_ids, *turn_end_ids})
        added = tokenizer.added_tokens_decoder
        texts = {*THOUGHT_MARKERS, *THOUGHT_MARKERS.values()}
        self._thought_markers = {i: str(t) for i, t in added.items() if t.special and str(t) in texts}
        self._greedy = GenerationConfig(
            eos_token_id=self._end_ids or None,
            pad_token_id=self.tokenizer.pad_token_id,
            suppress_tokens=language_model.padding_ids or None,
            do_sample=False,
        )

    @property
    def eot_token_id(self) -> int | None:
        """The end token: a stop string of every benchmark that generates."""
        return (
            next(iter(self._language_model.end_ids), None)
            if self.tokenizer.eos_token_id is None
            else (self.tokenizer.eos_token_id)
        )

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """The text of ids. The markers of a thought stay where they are special tokens."""
        special, ids = self._thought_markers, [tokens] if isinstance(tokens, int) else tokens
        if not (skip_special_tokens and special):
            return str(super().tok_decode(tokens, skip_special_tokens=skip_special_tokens))
        pieces = groupby(ids, key=special.get)
        return "".join(
            marker * len(list(piece)) if marker else str(super(TransformersModel, self).tok_decode(list(piece)))
            for marker, piece in pieces
        )

    def choose_batch_size(self, longest: int, projected: int) -> None:
        self.batch_size_per_gpu = self._fixed_batch_size or _largest_batch_size(
            self._language_model, longest, projected
        )

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        processors: list[LogitsProcessor] = [FiniteLogits(self._language_model, self._end_ids)]
        if self.sampling.temperature:
            mask = settings["attention_mask"].bool()
            seeds = self.next_seeds([ids[kept].tolist() for ids, kept in zip(context, mask, strict=True)])
            processors.append(SeededSampling(seeds, self.sampling.temperature, self.sampling.top_p, context.device))
        settings["logits_processor"] = LogitsProcessorList(processors)
        # The model's own config would fill in every unset value, such as a repetition penalty.
        with replaced_attribute(self.model, "generation_config", self._greedy), self._token_count_shown():
            output: torch.Tensor = super()._model_generate(context, max_length, stop, **settings)
        responses = output[:, context.shape[1] :]
        ended = torch.isin(responses, torch.tensor(self._end_ids, device=responses.device)).any(1).tolist()
        at_limit = responses.shape[1] >= max_length - context.shape[1]
        end_token = self.tok_decode(self.eot_token_id, skip_special_tokens=False)  # lm-eval adds it to `stop`
        for ids, end in zip(responses.tolist(), ended, strict=True):
            stop_string = _first_stop(self.tok_decode(ids), stop)
            self.response_log.pending.append(
                (at_limit and not end and stop_string is None, None if stop_string == end_token else stop_string)
            )
        return output

    @contextmanager
    def _token_count_shown(self) -> Iterator[None]:
        """Shows the length of the responses in progress: the bar stands still until a whole batch is complete."""
        tokens = count(1)
        hook = self.model.register_forward_hook(lambda *_: self.request_progress.show_metrics({"tokens": next(tokens)}))
        try:
            yield
        finally:
            hook.remove()


def _first_stop(text: str, stops: list[str]) -> str | None:
    """The stop string at which lm-eval cuts a response."""
    return min((stop for stop in stops if stop and stop in text), key=text.index, default=None)


def _largest_batch_size(language_model: LanguageModel, longest: int, projected: int) -> int:
    """The power of two that fits in memory; it depends on model, machine and lengths alone."""
    config = language_model.model.config
    width = torch.finfo(language_model.model.dtype).bits // 8
    eager = config.get_text_config()._attn_implementation == "eager"  # noqa: SLF001
    weights = sum(parameter.nbytes for parameter in language_model.model.parameters())
    sequence = model_size(config).sequence_bytes(width, longest, projected, eager=eager)
    return fitting_batch_size(sequence, weights, language_model.device.type)
