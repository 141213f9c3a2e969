"""The check of a reader: before a run, log-probabilities from its hidden states are compared with known ones.

The known ones are transformers' if the model fits in the machine's memory. They prove everything: weights, ids,
positions, norm and head. Else they are those of vLLM's own head, from a process that ends before the run. They prove
ids, positions, norm and head. Either model runs once over a few short sequences and a longer one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from tsdkd.core import Head
from tsdkd.core.distributions import log_probs
from tsdkd.errors import TsdkdError
from tsdkd.stages.data.hidden_reader import HiddenReader
from tsdkd.stages.engines.engine_check import QUANTISED_TOLERANCE, TOLERANCE, WEIGHTS_REMEDY
from tsdkd.stages.engines.vllm_engine import EngineProcess
from tsdkd.stages.engines.vllm_reading import read_log_probs
from tsdkd.stages.models.device import available_memory
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.spec import ModelSpec
from tsdkd.stages.models.weights import weight_bytes

SHORT_SEQUENCES, SHORT_TOKENS, LONG_TOKENS = 3, 64, 1024
MEMORY_FACTOR = 1.5
"""Memory that transformers needs on the CPU, in multiples of the weights."""
ROWS = 256
"""Tokens whose logits are formed at a time."""


@dataclass(frozen=True)
class ExpectedLogProbs:
    """The log-probability of every token after the first, (tokens - 1,) per sequence, over all rows of the head."""

    engine: str
    """Whose they are."""
    values: list[Tensor]
    tolerance: float
    """The mean difference that rounding explains, in nats per token."""


def checked_sequences(sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """The starts of the longest sequence and of a few others."""
    ordered = sorted(sequences, key=len)
    others = ordered[: -1 : max(1, len(ordered) // SHORT_SEQUENCES)][:SHORT_SEQUENCES]
    return [list(ordered[-1][:LONG_TOKENS]), *(list(ids[:SHORT_TOKENS]) for ids in others)]


def expected_log_probs(spec: ModelSpec, arguments: dict[str, Any], sequences: list[list[int]]) -> ExpectedLogProbs:
    """Known log-probabilities of a model that vLLM will read with `arguments`. Frees the model's memory."""
    tolerance = TOLERANCE[arguments["dtype"]]
    if not _fits(spec):
        values = _vllm_log_probs(arguments, sequences)
        return ExpectedLogProbs("vLLM's own head", values, tolerance)
    tolerance = QUANTISED_TOLERANCE if arguments.get("quantization") else tolerance
    return ExpectedLogProbs("transformers", _transformers_log_probs(spec, arguments["dtype"], sequences), tolerance)


def check_reader(reader: HiddenReader, sequences: list[list[int]], expected: ExpectedLogProbs) -> str:
    """Compare a reader with known log-probabilities. Returns the difference in words; raises TsdkdError beyond it."""
    reader.start(sequences)
    states = reader.finish()
    found = [log_probs_of(reader.head, h, ids) for h, ids in zip(states, sequences, strict=True)]
    difference = float((torch.cat(found) - torch.cat(expected.values)).abs().mean())
    if not difference <= expected.tolerance:  # NaN too
        remedy = WEIGHTS_REMEDY if expected.engine == "transformers" else "The hidden states are not the head's input."
        raise TsdkdError(
            f"vLLM's hidden states of {reader.name} and {expected.engine} disagree: log-probabilities differ by "
            f"{difference:.3f} nats per token (rounding explains {expected.tolerance:.3f}).",
            f"{remedy} Or use --engine transformers.",
        )
    tokens = sum(map(len, expected.values))
    return f"{reader.name}: vLLM and {expected.engine} differ by {difference:.5f} nats per token on {tokens} tokens."


def log_probs_of(head: Head, hidden: Tensor, ids: Sequence[int]) -> Tensor:
    """Hidden states (tokens, width) -> the log-probabilities of ids[1:] over all rows of the head, on the CPU."""
    head, hidden = Head(head.weight, head.bias, head.logit_scale, head.softcap), hidden[:-1]
    following = torch.tensor(ids[1:]).unsqueeze(-1)
    with torch.inference_mode():
        pieces = [
            log_probs(head.logits(rows.to(head.weight.device))).cpu().gather(-1, token).squeeze(-1)
            for rows, token in zip(hidden.split(ROWS), following.split(ROWS), strict=True)
        ]
    return torch.cat(pieces).float()


def _fits(spec: ModelSpec) -> bool:
    """Whether transformers can read the model on this machine's CPU."""
    config = AutoConfig.from_pretrained(spec.directory, trust_remote_code=False)
    quantised = getattr(config, "quantization_config", None) is not None
    return not quantised and MEMORY_FACTOR * weight_bytes(spec.directory) <= available_memory("cpu")


def _transformers_log_probs(spec: ModelSpec, dtype: Any, sequences: list[list[int]]) -> list[Tensor]:
    model = load_model(str(spec.directory), dtype, device="cpu").model
    values = []
    with torch.inference_mode():
        for ids in sequences:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
            following = torch.tensor(ids[1:]).unsqueeze(-1)
            values.append(log_probs(logits).gather(-1, following).squeeze(-1).float())
    return values


def _vllm_log_probs(arguments: dict[str, Any], sequences: list[list[int]]) -> list[Tensor]:
    longer = {name: arguments[name] + 1 for name in ("max_model_len", "max_num_batched_tokens")}  # for one new token
    process = EngineProcess(arguments | longer, reply=read_log_probs)
    try:
        process.receive_outputs()
        process.send(sequences)
        return [torch.tensor(values) for values in process.receive_outputs()]
    finally:
        process.terminate()
        process.close()
