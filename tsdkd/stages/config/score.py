"""Configuration of `tsdkd score`."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from tsdkd.core.config import TSDKDConfig
from tsdkd.errors import InputError
from tsdkd.stages.config.chat import ChatConfig, recorded_chat_options
from tsdkd.stages.config.groups import ENGINE, SCORING, VLLM
from tsdkd.stages.config.option import nested, option
from tsdkd.stages.config.types import DTYPE_HELP, DType, attention_option, data_parallel_option, ray_option


@dataclass(frozen=True)
class ScoreConfig:
    """Which values of both models are recorded at each response token."""

    signal: Literal["hidden", "hidden8", "topk", "ranks"] = option(
        "hidden",
        "Teacher signal. hidden: exact and large; hidden8: int8, half the size; topk: small, bounds the divergence "
        "from below; ranks: no direct term.",
        group=SCORING,
        common=True,
    )
    k: int = option(TSDKDConfig.k, "Candidates per position.", group=SCORING, min_=2, common=True)
    top_k: int = option(64, "topk: teacher log-probabilities recorded per token.", group=SCORING, min_=1, common=True)
    teacher_by: str | None = option(
        None,
        "Column that names the teacher of each response; with several --teacher NAME=MODEL.",
        group=SCORING,
        metavar="COLUMN",
        shown="as recorded",
    )
    batch_tokens: int = option(
        8192, "Tokens per forward; a longer sequence is read alone.", group=ENGINE, min_=1, common=True
    )
    dtype: DType = option("auto", DTYPE_HELP, group=ENGINE)
    engine: Literal["transformers", "vllm"] = option(
        "transformers", "Engine that reads both models.", group=ENGINE, common=True
    )
    attention: str | None = attention_option()
    chat: ChatConfig = nested(ChatConfig, options=recorded_chat_options())
    """That of the rollouts, or unset, which stands for it; not recorded."""
    device_map: Literal["one", "auto"] = option(
        "one", "auto: spread each model over all GPUs, then the machine's memory; one process.", group=ENGINE
    )
    data_parallel: int | None = data_parallel_option()
    ray: str | None = ray_option()
    tensor_parallel: int = option(1, "GPUs of the teacher; the student is on one.", group=VLLM, min_=1)
    memory_fraction: float = option(
        0.9,
        "Fraction of the GPU's memory (or the machine's) for both models' weights and caches.",
        group=VLLM,
        min_=0,
        max_=1,
    )
    quantization: str | None = option(
        None, "Quantisation of the teacher's weights, such as fp8.", group=VLLM, metavar="NAME", shown="as saved"
    )


def recorded_scoring(config: ScoreConfig) -> dict[str, Any]:
    """The settings that scores record; those of vLLM only where it is the engine."""
    unrecorded = {"device_map", "data_parallel", "ray", "memory_fraction", "chat"}
    if config.teacher_by is None:
        unrecorded.add("teacher_by")
    if config.engine != "vllm":
        unrecorded |= {"engine", "tensor_parallel", "quantization"}
    return {name: value for name, value in asdict(config).items() if name not in unrecorded}


def require_candidates(config: ScoreConfig, vocab: int) -> None:
    """Raises InputError unless `vocab` ids are more than are recorded per token."""
    for name, value in (("--k", config.k), ("--top-k", config.top_k if config.signal == "topk" else 0)):
        if value >= vocab:
            raise InputError(
                f"{name} is {value}, but the vocabulary has only {vocab} tokens.", f"Choose a smaller {name}."
            )
