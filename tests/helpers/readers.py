"""A stand-in for vLLM's child process: transformers reads, in this process."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from tsdkd.errors import TsdkdError
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.load import load_model


class ReadingProcess:
    """As `EngineProcess` with the reply `read_hidden` or `read_log_probs`; `change` alters the states that it sends."""

    change: Callable[[Tensor], Tensor] = staticmethod(lambda hidden: hidden)
    remaining: int | None = None
    """Messages until all processes end, as if one was killed; None: they never end."""
    started: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, arguments: dict[str, Any], *, reply: Callable[..., None], memory_remedy: str = "") -> None:
        self.arguments, self.reply = arguments, reply.__name__
        type(self).started.append(arguments)
        self.model: LanguageModel = load_model(arguments["model"], arguments["dtype"])
        self.outbox: list[Any] = [[]]

    def send(self, sequences: list[list[int]]) -> None:
        if type(self).remaining is not None:
            type(self).remaining -= 1
            if type(self).remaining < 0:
                raise TsdkdError("vLLM failed: its process ended with status -9.", "Use --engine transformers.")
        limits = self.arguments["max_model_len"], self.arguments["max_num_batched_tokens"]
        assert max(map(len, sequences)) <= min(limits)
        self.outbox.append([self._read(ids) for ids in sequences])

    def receive_outputs(self) -> Any:
        message = self.outbox.pop(0)
        if not message or self.reply == "read_log_probs":
            return message
        self.hidden = self.change(torch.cat(message))
        return str(self.hidden.dtype).removeprefix("torch."), tuple(self.hidden.shape)

    def receive_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert (tuple(self.hidden.shape), self.hidden.dtype) == (shape, dtype)
        return self.hidden

    def terminate(self) -> None: ...

    def close(self) -> None: ...

    def _read(self, ids: list[int]) -> Any:
        tensor = torch.tensor([ids])
        with torch.inference_mode():
            if self.reply == "read_hidden":
                return self.model.hidden(tensor, torch.ones_like(tensor))[0]
            log_probs = self.model.model(input_ids=tensor).logits[0, :-1].log_softmax(-1)
        return log_probs.gather(-1, tensor[0, 1:, None]).squeeze(-1).tolist()
