"""Configuration of `tsdkd eval`."""

from dataclasses import dataclass

from tsdkd.errors import InputError
from tsdkd.stages.config.chat import ChatConfig
from tsdkd.stages.config.groups import BENCHMARKS, CHAT, ENGINE, SAMPLING
from tsdkd.stages.config.option import nested, option
from tsdkd.stages.config.types import DTYPE_HELP, DType, EvalEngine, attention_option, data_parallel_option, ray_option


@dataclass(frozen=True)
class EvalConfig:
    """Which benchmarks are measured, and with which engine."""

    tasks: tuple[str, ...] = option(
        ("all",),
        "Benchmarks, joined by commas; all, reasoning: a suite; NAME:VARIANT: a variant.",
        group=BENCHMARKS,
        metavar="NAMES",
        shown="all: the paper's ten",
        common=True,
    )
    limit: int | None = option(
        None, "Documents per benchmark, spread over its subjects.", group=BENCHMARKS, min_=1, common=True
    )
    chat_template: bool | None = option(
        None,
        "Format prompts with the chat template.",
        group=CHAT,
        name="chat",
        shown="where the model has one",
    )
    chat: ChatConfig = nested(ChatConfig)
    """Of every model."""
    max_new_tokens: int | None = option(
        None, "Longest response, in tokens.", group=SAMPLING, min_=1, shown="the benchmark's limit"
    )
    temperature: float | None = option(
        None, "Sampling temperature; 0: greedy.", group=SAMPLING, min_=0, shown="0; reasoning suite: 0.6"
    )
    top_p: float | None = option(
        None, "Nucleus sampling.", group=SAMPLING, min_=0, max_=1, shown="1; reasoning suite: 0.95"
    )
    samples: int | None = option(
        None, "Responses per document.", group=SAMPLING, min_=1, shown="1; reasoning suite: 16 or 4"
    )
    seed: int = option(0, "Seed of sampled responses.", group=SAMPLING, min_=0, common=True)
    """The manifest's seed."""
    max_length: int | None = option(
        None, "Longest prompt with response, in tokens.", group=ENGINE, min_=1, shown="the model's context"
    )
    engine: EvalEngine = option("transformers", "Engine that samples responses.", group=ENGINE, common=True)
    data_parallel: int | None = data_parallel_option()
    ray: str | None = ray_option()
    tensor_parallel: int = option(1, "vLLM: GPUs per model.", group=ENGINE, min_=1)
    memory_fraction: float = option(
        0.9, "vLLM: fraction of the GPU's memory (or the machine's).", group=ENGINE, min_=0, max_=1
    )
    """Not recorded."""
    batch_size: int | None = option(
        None, "Requests at a time.", group=ENGINE, min_=1, shown="as many as fit", common=True
    )
    """Changes results only through the rounding of 16-bit numbers."""
    dtype: DType = option("auto", DTYPE_HELP, group=ENGINE)
    attention: str | None = attention_option()

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InputError("--tasks names no benchmark.", "Name some, or leave it out for the paper's ten.")
        if self.chat.is_set and self.chat_template is False:
            raise InputError(
                "--no-chat switches the chat template off that --chat-template or --chat-template-kwargs sets.",
                "Leave out --no-chat, or the other option.",
            )
