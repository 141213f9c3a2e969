"""The engine check: before a long run, vLLM samples a few tokens and transformers computes their log-probabilities.

Both read the same weights, so a difference beyond rounding has one of two causes. The engine holds other weights (a
stale or missing adapter, another revision), or it transforms logits differently (chat template, temperature, top-k).
Transformers runs on the CPU, because the engine fills the GPU's memory.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from tsdkd.errors import TsdkdError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.requests import Request
from tsdkd.stages.engines.protocol import Engine
from tsdkd.stages.engines.transformers_engine import nucleus_logits
from tsdkd.stages.engines.vllm_engine import VllmEngine
from tsdkd.stages.engines.vllm_process import EngineOutput
from tsdkd.stages.models.language_model import LanguageModel
from tsdkd.stages.models.load import load_model
from tsdkd.stages.models.spec import ModelSpec

CHECKED_RESPONSES, CHECKED_TOKENS = 4, 24
TOLERANCE = {"float32": 0.005, "bfloat16": 0.15, "float16": 0.05}
"""Mean difference of log-probabilities that rounding explains, by precision: nats per token at temperature 1.

Measured between vLLM and transformers in bfloat16: 0.07.
"""
QUANTISED_TOLERANCE = 0.3
"""The same for an engine that quantises the weights."""
LOWER_FRACTION = 0.05
"""Fraction of tokens that rounding may make less likely when the engine excludes other tokens."""
TRIED_TEMPERATURES = [0.05 * 1.05**i for i in range(90)]  # 0.05 to 3.8

WEIGHTS_REMEDY = "Wrong weights or adapter: check the model directory, the adapter and its base, and --quantization."
SAMPLING_REMEDY = (
    "Another chat template or sampling setting: check vLLM's version and plugins, or use --engine transformers."
)


class CheckedEngine(Protocol):
    """vLLM, in another process or behind a server."""

    def sample_with_log_probs(self, requests: list[Request], max_new_tokens: int) -> list[EngineOutput]:
        """The start of each response with its log-probabilities."""


def check_engine(
    engine: Engine, requests: list[Request], models: Mapping[str, ModelSpec], author: str, config: GenerateConfig
) -> None:
    """Compare vLLM with transformers; other engines pass unchecked. Raises TsdkdError when they disagree."""
    if not isinstance(engine, VllmEngine):
        return
    spec = models[author]
    dtype = spec.resolve_dtype(config.dtype)
    model = replace(load_model(spec.name, config.dtype, device="cpu"), shared_vocab=spec.vocab)
    compare_with_model(engine, requests, model, config, dtype)


def compare_with_model(
    engine: CheckedEngine, requests: list[Request], model: LanguageModel, config: GenerateConfig, dtype: str
) -> None:
    """Compare vLLM, which computes in `dtype`, with a loaded model. Raises TsdkdError when they disagree."""
    if mismatch := find_mismatch(engine, requests[:CHECKED_RESPONSES], model, config, dtype):
        raise disagreement(model.name, *mismatch)


def find_mismatch(
    engine: CheckedEngine, requests: list[Request], model: LanguageModel, config: GenerateConfig, dtype: str
) -> tuple[str, str] | None:
    """The difference between vLLM and a model with its likely remedy, from one forward of the model per request."""
    outputs = engine.sample_with_log_probs(requests, min(CHECKED_TOKENS, config.response_limit))
    logits = _logits(model, outputs)
    if [output.prompt_ids for output in outputs] != [request.prompt_ids for request in requests]:
        return "vLLM read other prompt ids than it received", SAMPLING_REMEDY
    tolerance = QUANTISED_TOLERANCE if config.quantization else TOLERANCE[dtype]
    return diagnose_mismatch(logits, outputs, config.temperature, config.top_p, tolerance)


def diagnose_mismatch(
    logits: list[Tensor], outputs: list[EngineOutput], temperature: float, top_p: float, tolerance: float
) -> tuple[str, str] | None:
    """The difference between engine and transformers with its likely remedy, None where they agree.

    `logits`: of transformers, before each sampled token, (tokens, vocab) per response. `tolerance`: see `TOLERANCE`.
    A temperature is recognised by trying several. Excluding tokens (top-k, penalties) only raises the probability of
    the others. Other weights also lower that of some sampled tokens.
    """
    engine_log_probs = torch.tensor([value for output in outputs for value in output.log_probs])
    ids = torch.tensor([token for output in outputs for token in output.response_ids])
    flat = torch.cat(logits).float()
    allowed = tolerance / min(1.0, temperature or 1.0)
    expected = _gather(_sampling_log_probs(flat, temperature or 1.0, top_p), ids)
    difference = float((engine_log_probs - expected).abs().mean())
    if difference <= allowed:
        return None
    finding = f"log-probabilities differ by {difference:.3f} nats per token (rounding explains {allowed:.3f})"
    by_temperature = {
        t: float((engine_log_probs - _gather(_sampling_log_probs(flat, t, 1.0), ids)).abs().mean())
        for t in TRIED_TEMPERATURES
    }
    best = min(by_temperature, key=lambda t: by_temperature[t])
    if by_temperature[best] <= max(allowed, difference / 5):
        return f"{finding}; vLLM's fit temperature {best:.2f}", SAMPLING_REMEDY
    if float((engine_log_probs < expected - 2 * allowed).float().mean()) < LOWER_FRACTION:
        return f"{finding}; vLLM's are only higher", SAMPLING_REMEDY
    return f"{finding}; vLLM's are higher and lower", WEIGHTS_REMEDY


def _sampling_log_probs(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Log-probabilities (tokens, vocab) of the distribution that is sampled from.

    Tokens outside the nucleus keep their value without top-p, because rounding moves the edge of the nucleus.
    """
    plain = (logits / temperature).log_softmax(-1)
    nucleus = nucleus_logits(plain, top_p).log_softmax(-1)
    return torch.where(nucleus.isinf(), plain, nucleus)


def _gather(log_probs: Tensor, ids: Tensor) -> Tensor:
    return log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _logits(model: LanguageModel, outputs: list[EngineOutput]) -> list[Tensor]:
    """Logits (tokens, vocab) before each sampled token, per response, float32 on the CPU."""
    logits_by_response = []
    with torch.no_grad():  # a sharded model keeps the tensors that it gathers here, and trains with them
        for output in outputs:
            ids = torch.tensor([[*output.prompt_ids, *output.response_ids]], device=model.device)
            logits = model.model(input_ids=ids, use_cache=False).logits[
                0, len(output.prompt_ids) - 1 : -1, : model.vocab
            ]
            logits_by_response.append(logits.float().cpu())
    return logits_by_response


def disagreement(name: str, finding: str, remedy: str) -> TsdkdError:
    return TsdkdError(f"vLLM and transformers disagree about {name}: {finding}.", remedy)
