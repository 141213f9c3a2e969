"""How the responses of lm-eval's models end, and the progress of their requests, for each engine.

lm-eval reports no truncation and no stop strings: `ResponseTracking` records both.
"""

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from math import isnan
from typing import Any, Self, cast

from tsdkd.errors import InputError
from tsdkd.stages.data.batches import Ids
from tsdkd.stages.data.thoughts import remove_thought
from tsdkd.stages.eval.seeded_sampling import response_seed
from tsdkd.stages.models.chat import fit_system
from tsdkd.stages.models.chat_rendering import render_chat
from tsdkd.stages.models.language_model import not_finite_error
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
