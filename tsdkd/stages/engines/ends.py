"""What ends a response: an end token, a stop string, or the limit."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from tsdkd.errors import InputError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.batches import Ids
from tsdkd.stages.data.requests import FinishReason

INVALID_PREFIX = "Invalid prefix encountered"
"""The error of a `DecodeStream` whose bytes are not the start of UTF-8 text; it has no type of its own."""


def finish_reason(config: GenerateConfig, *, ended: bool) -> FinishReason:
    """The reason of a response that an end token or a stop string `ended`, or that its limit cut."""
    cut: FinishReason = "early" if config.rollout_tokens else "length"
    return "stop" if ended else cut


def require_stop_support(config: GenerateConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError for stop strings with a tokenizer that cannot decode token by token."""
    if config.stop and not tokenizer.is_fast:
        raise InputError("--stop needs a tokenizer with a tokenizer.json.", "Leave out --stop.")


class StopStringFinder:
    """Finds the token that completes a stop string in one response, as vLLM does, so that engines agree.

    The tokens after the prompt are decoded one by one, special tokens included. A character that spans several tokens
    appears with its last one.
    """

    def __init__(self, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompt_ids: Ids) -> None:
        self.stop = stop
        self.length = 0
        """Tokens up to the one that completes a stop string; all tokens as long as none does."""
        self.found = False
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(ids=list(prompt_ids), skip_special_tokens=False)
        self._kept = max(map(len, stop)) - 1
        self._text = ""

    def append(self, token: int) -> bool:
        """Take the next token. Returns whether this token or an earlier one completes a stop string."""
        if not self.found:
            self.length += 1
            self._text = self._text[max(0, len(self._text) - self._kept) :] + self._decode(token)
            self.found = any(text in self._text for text in self.stop)
        return self.found

    def _decode(self, token: int) -> str:
        try:
            return self._stream.step(self._backend, token) or ""
        except Exception as error:
            if not str(error).startswith(INVALID_PREFIX):
                raise
            self._stream = DecodeStream(skip_special_tokens=False)
            return self._stream.step(self._backend, token) or ""
