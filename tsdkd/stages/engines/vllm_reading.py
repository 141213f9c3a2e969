"""What the child processes of `VllmReader` and of its check run: vLLM reads sequences of ids.

vLLM's "token_embed" task returns a model's hidden states after its last norm, of every architecture that it serves.
"""

from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_hidden(pipe: Connection, arguments: dict[str, Any], _: Path | None = None) -> None:
    """A `Reply` to lists of sequences: [dtype, shape] of their hidden states, joined, then the bytes."""
    from vllm import LLM, PoolingParams
    from vllm.config import PoolerConfig

    pooler = PoolerConfig(task="token_embed", tok_pooling_type="ALL", use_activation=False)
    llm = LLM(**arguments, runner="pooling", convert="embed", pooler_config=pooler)
    pipe.send([])
    while True:
        outputs = llm.encode(
            _prompts(pipe.recv()),
            pooling_params=PoolingParams(use_activation=False),
            pooling_task="token_embed",
            use_tqdm=False,
        )
        hidden = torch.cat([output.outputs.data for output in outputs])
        pipe.send([str(hidden.dtype).removeprefix("torch."), tuple(hidden.shape)])
        pipe.send_bytes(_as_bytes(hidden))


def read_log_probs(pipe: Connection, arguments: dict[str, Any], _: Path | None = None) -> None:
    """A `Reply` to lists of sequences: of each, the log-probability of every token after the first, by vLLM's head."""
    from vllm import LLM, SamplingParams

    llm = LLM(**arguments)
    pipe.send([])
    while True:
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = llm.generate(_prompts(pipe.recv()), sampling, use_tqdm=False)
        pipe.send([_log_probs(output) for output in outputs])


def _log_probs(output: Any) -> list[float]:
    """Of a vLLM `RequestOutput`, whose first token has none."""
    pairs = zip(output.prompt_logprobs, output.prompt_token_ids, strict=True)
    return [by_id[token].logprob for by_id, token in pairs if by_id]


def _prompts(sequences: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": ids} for ids in sequences]


def _as_bytes(tensor: Tensor) -> Any:
    return tensor.flatten().view(torch.uint8).numpy()  # a connection counts the rows of an array
