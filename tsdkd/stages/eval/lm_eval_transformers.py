"""The transformers model that lm-eval evaluates, and the tracking of responses that it shares with vLLM's.

lm-eval reports no truncation and no stop strings: `ResponseTracking` records both.
Imports lm-eval, so other modules import it late.
"""

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, groupby
from math import isnan
from typing import Any, Self, cast

import torch
from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from tsdkd.errors import InputError
from tsdkd.stages.data.batches import Ids
from tsdkd.stages.data.thoughts import THOUGHT_MARKERS, remove_thought
from tsdkd.stages.engines.transformers_engine import FiniteLogits
from tsdkd.stages.eval.seeded_sampling import SeededSampling, response_seed
from tsdkd.stages.models.attributes import replaced_attribute
from tsdkd.stages.models.chat import fit_system
from tsdkd.stages.models.chat_rendering import render_chat
from tsdkd.stages.models.language_model import LanguageModel, not_finite_error
from tsdkd.stages.models.model_size import fitting_batch_size, model_size
from tsdkd.stages.models.vocabulary import require_known_ids
from tsdkd.stages.results.benchmark import Sampling


class TrackedResponse(str):
    """The part of a response that is scored, with the whole response and how it ended."""

    text: str
    truncated: bool
    """The limit cut the response, or it ended within its thought."""
    stop: str | None
    """The stop string that ended it."""

    @classmethod
    def of(cls, prompt: str, text: str, truncated: bool = False, stop: str | None = None) -> Self:
        answer, finished = remove_thought(prompt, text)
        response = cls(answer)
        response.text, response.truncated, response.stop = text, truncated or not finished, stop
        return response


class ResponseLog:
    """Records truncated prompts, and how responses end. lm-eval passes it every response as its cache hook."""

    def __init__(self) -> None:
        self.truncated_prompts: set[str] = set()
        self.endings: dict[tuple[str, str], tuple[bool, str | None]] = {}
        """Whether a response is truncated, and its stop string, by prompt and response."""
        self.pending: deque[tuple[bool, str | None]] = deque()
        """The endings of sampled responses that lm-eval has not yet passed."""

    def add_partial(self, kind: str, request: tuple[str, Any], response: Any) -> None:
        """lm-eval calls this once for each response, in the order of `pending`."""
        if kind == "generate_until":
            self.endings[request[0], response] = self.pending.popleft()


class RequestProgress:
    """Connects a model with the progress bar of the benchmark that runs."""

    def __init__(self) -> None:
        self.advance: Callable[[int], None] = lambda _: None
        """Receives the number of requests just completed."""
        self.show_metrics: Callable[[dict[str, float]], None] = lambda _: None
        """Receives values to show beside the bar."""
        self.open_bar: Callable[[int], Any] = lambda _: None
        """Opens the bar for a number of requests; it has a method `close`."""
        self.counted_by_engine = False
        """The engine calls `forward` itself. lm-eval counts whole batches, and a benchmark may be a single batch."""

    def forward(self, count: int) -> None:
        """Advance the bar of the benchmark that runs now."""
        self.advance(count)


class ResponseTracking:
    """Mixin for lm-eval's model classes: records how responses end, seeds the scorers' random choices, keeps system
    messages that a chat template would drop, and refuses ids that the model does not know."""

    response_log: ResponseLog
    request_progress: RequestProgress
    max_length: int
    sampling: Sampling
    _name: str
    _vocab: int
    _dtype: str
    _seed: int
    _whole_prompts: bool
    _prompt_counts: Counter[tuple[int, ...]]
    """How often each prompt was sampled: lm-eval repeats a prompt for each sample."""
    _sample_numbers: deque[int]
    """Those of the next responses, where a driver gives them."""
    _samples: deque[list[TrackedResponse]]
    """Samples that lm-eval has not yet scored, each with a response to every request."""

    def start_tracking(self, name: str, vocab: int, dtype: str) -> None:
        """`name`: the model's; `vocab`: the number of ids that it knows; `dtype`: its precision."""
        self.response_log, self.request_progress = ResponseLog(), RequestProgress()
        self._name, self._vocab, self._dtype = name, vocab, dtype
        cast("Any", self).set_cache_hook(self.response_log)
        self.start_benchmark(Sampling(), seed=0)

    def start_benchmark(
        self, sampling: Sampling, seed: int, whole_prompts: bool = False, sample_numbers: Sequence[int] = ()
    ) -> None:
        """The next `sampling.samples` calls of `generate_until` return one sample each of the same requests.

        `whole_prompts`: they raise InputError for a prompt that would be truncated. `sample_numbers`: of the next
        responses, in the order of their batches; by default, equal prompts are counted.
        """
        self.sampling, self._seed, self._whole_prompts = sampling, seed, whole_prompts
        self._prompt_counts, self._samples, self._sample_numbers = Counter(), deque(), deque(sample_numbers)
        self.response_log.truncated_prompts.clear()

    def next_seeds(self, prompts: Sequence[Ids]) -> list[int]:
        """The seeds of the next responses to these prompts."""
        seeds = []
        for ids in map(tuple, prompts):
            number = self._sample_numbers.popleft() if self._sample_numbers else self._prompt_counts[ids]
            seeds.append(response_seed(self._seed, ids, number))
            self._prompt_counts[ids] += 1
        return seeds

    def tok_encode(self, *args: Any, **settings: Any) -> Any:
        """The ids of a text, or of each text of a list. Raises InputError for an id that the model does not know."""
        encoded = super().tok_encode(*args, **settings)  # type: ignore[misc]
        texts = encoded if encoded and isinstance(encoded[0], list) else [encoded]
        require_known_ids(self._name, self._vocab, max((i for ids in texts for i in ids), default=0))
        return encoded

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation by the tokenizer's chat template.

        lm-eval itself would drop the task's instructions where the template refuses a system message, and with vLLM it
        would read another template than the tokenizer's, with `enable_thinking` set to None.
        """
        model = cast("Any", self)
        return render_chat(
            model.tokenizer,
            fit_system(model.tokenizer, chat_history),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **model.chat_template_args,
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[TrackedResponse]:
        """The answers of one sample; the first call generates all samples, so that an engine batches them together."""
        if not self._samples:
            responses = self.respond(requests * self.sampling.samples, disable_tqdm)
            size = len(requests)
            self._samples.extend(responses[start : start + size] for start in range(0, len(responses), size))
        random.seed(0)  # IFEval's scorer draws the details that an instruction leaves open
        return self._samples.popleft()

    def respond(self, requests: list[Any], disable_tqdm: bool = False) -> list[TrackedResponse]:
        """A response to each request. Raises InputError for a prompt that is too long to be whole."""
        limit = requests[0].args[1]["max_gen_toks"]
        prompts = [request.args[0] for request in requests]
        lengths = {prompt: len(cast("Any", self).tok_encode(prompt)) + limit for prompt in dict.fromkeys(prompts)}
        if self._whole_prompts and (excess := max(lengths.values()) - self.max_length) > 0:
            raise InputError(
                f"A prompt of {max(lengths.values()) - limit:,} tokens and {limit:,} new tokens exceed the context of "
                f"{self.max_length:,}.",
                f"Give a --max-new-tokens of at most {limit - excess:,}, or leave the benchmark out.",
            )
        self._prepare(lengths, projected=1)
        texts: list[str] = super().generate_until(requests, disable_tqdm)  # type: ignore[misc]
        endings, self.response_log.endings = self.response_log.endings, {}
        return [
            TrackedResponse.of(prompt, text, *endings[prompt, text])
            for prompt, text in zip(prompts, texts, strict=True)
        ]

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        lengths = {key[0]: len(context) + len(continuation) for key, context, continuation in requests}
        self._prepare(lengths, projected=max(lengths.values()))
        scored: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **kwargs)  # type: ignore[misc]
        if any(isnan(log_likelihood) for log_likelihood, _ in scored):
            raise not_finite_error(self._name, self._dtype)
        return scored

    def _prepare(self, lengths: dict[str, int], projected: int) -> None:
        """`lengths`: tokens of prompt and response, by prompt; `projected`: positions of a sequence with logits."""
        self.response_log.truncated_prompts |= {
            prompt for prompt, length in lengths.items() if length > self.max_length
        }
        self.choose_batch_size(min(max(lengths.values()), self.max_length), projected)

    def choose_batch_size(self, longest: int, projected: int) -> None:
        """Called before each list of requests, with the tokens of its longest sequence."""

    def close(self) -> None:
        """Called after the last request."""


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
