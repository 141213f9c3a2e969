"""The engine's canary: before a long run it samples a few tokens, and transformers says how likely those were.

Both read the same weights, so log-probabilities that differ by more than rounding mean that the engine reads other
weights (a stale or missing adapter, another revision) or samples otherwise (a template, temperature or top-k of its
own). Transformers reads on the CPU: beside an engine its GPU has no room.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tsdkd.errors import TsdkdError
from tsdkd.stages.config.generate import GenerateConfig
from tsdkd.stages.data.requests import Request
from tsdkd.stages.engines.protocol import Engine
from tsdkd.stages.engines.transformers_engine import nucleus_logits
from tsdkd.stages.engines.vllm_engine import CheckedResponse, VllmEngine
from tsdkd.stages.models.load import LanguageModel, load_model
from tsdkd.stages.models.spec import ModelSpec
from tsdkd.stages.models.tokenizers import vocab_size

RESPONSES, TOKENS = 4, 24
NOISE = {"float32": 0.005, "bfloat16": 0.15, "float16": 0.05}
"""Nats a token that two right engines may differ by, in the mean and at temperature 1. Measured in bf16: 0.07."""
QUANTISED = 0.3
"""The same where the engine quantises and transformers does not."""
WEIGHTS = "Wrong weights or adapter: check the model directory, the adapter and its base, and --quantization."
TEMPLATE = "Another template or sampling transform: check vLLM's version and plugins, or use --engine transformers."
FEW = 0.05
"""Share of tokens that rounding alone may make less likely where others were taken away."""
TEMPERATURES = [0.05 * 1.05**i for i in range(90)]  # 0.05 to 3.8


def check_engine(
    engine: Engine, requests: list[Request], models: Mapping[str, ModelSpec], author: str, config: GenerateConfig
) -> None:
    """Raises TsdkdError where vLLM and transformers disagree; transformers is not held to itself."""
    if not isinstance(engine, VllmEngine):
        return
    model = models[author]
    dtype = config.dtype if config.dtype != "auto" else model.dtype
    check_against_model(engine, requests, load_model(model.name, config.dtype, device="cpu"), config, dtype)


def check_against_model(
    engine: VllmEngine, requests: list[Request], model: LanguageModel, config: GenerateConfig, dtype: str
) -> None:
    """Raises TsdkdError where vLLM, in the precision `dtype`, and a model at hand disagree."""
    chosen = requests[:RESPONSES]
    sung = engine.check_responses(chosen, min(TOKENS, config.max_new_tokens))
    asked = [request.prompt_ids for request in chosen] * config.data_parallel
    if [one.prompt_ids for one in sung] != asked:
        raise _stop(model.name, "it read other prompt tokens than it was sent", TEMPLATE)
    noise = QUANTISED if config.quantization else NOISE[dtype]
    cause = diagnose_difference(_logits(model, sung), sung, config.temperature, config.top_p, noise)
    if cause:
        raise _stop(model.name, *cause)


def diagnose_difference(
    logits: list[Tensor], sung: list[CheckedResponse], temperature: float, top_p: float, noise: float
) -> tuple[str, str] | None:
    """What was found and the usual cause behind it; None where engine and transformers agree.

    `logits`: transformers' own before each sampled token, (tokens, vocab) per response. `noise` in nats at
    temperature 1. Another temperature is found by trying some; whatever takes tokens away (top-k, penalties) makes
    those that are left likelier, none less likely; other weights make some of the sampled ones less likely too.
    """
    told = torch.tensor([value for one in sung for value in one.logprobs])
    ids = torch.tensor([token for one in sung for token in one.ids])
    flat = torch.cat(logits).float()
    allowed = noise / min(1.0, temperature or 1.0)
    expected = _of(_transformed(flat, temperature or 1.0, top_p), ids)
    apart = float((told - expected).abs().mean())
    if apart <= allowed:
        return None
    found = f"its log-probabilities are {apart:.3f} nats a token from transformers' (rounding: up to {allowed:.3f})"
    fits = {t: float((told - _of(_transformed(flat, t, 1.0), ids)).abs().mean()) for t in TEMPERATURES}
    best = min(fits, key=lambda t: fits[t])
    if fits[best] <= max(allowed, apart / 5):
        return f"{found}, but those of temperature {best:.2f}", TEMPLATE
    if float((told < expected - 2 * allowed).float().mean()) < FEW:
        return f"{found}, and never lower", TEMPLATE
    return f"{found}, higher and lower", WEIGHTS


def _transformed(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Log-probabilities that are sampled from; outside the nucleus as without one, since rounding moves its edge."""
    plain = (logits / temperature).log_softmax(-1)
    inside = nucleus_logits(plain, top_p).log_softmax(-1)
    return torch.where(inside.isinf(), plain, inside)


def _of(logprobs: Tensor, ids: Tensor) -> Tensor:
    return logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _logits(reader: LanguageModel, sung: list[CheckedResponse]) -> list[Tensor]:
    vocab, found = vocab_size(reader.tokenizer), []
    with torch.inference_mode():
        for one in sung:
            ids = torch.tensor([[*one.prompt_ids, *one.ids]], device=reader.device)
            logits = reader.model(input_ids=ids, use_cache=False).logits[0, len(one.prompt_ids) - 1 : -1, :vocab]
            found.append(logits.float().cpu())
    return found


def _stop(name: str, found: str, cause: str) -> TsdkdError:
    return TsdkdError(f"vLLM and transformers disagree about {name}: {found}.", cause)
