"""What each stage can be told, with the defaults the command line shows; loads without torch."""

from dataclasses import dataclass

from tsdkd.stages.config.types import DType, EvalEngine


@dataclass(frozen=True)
class EvalConfig:
    """What is measured."""

    tasks: tuple[str, ...] = ("all",)
    """Benchmarks by name; "all" is the paper's ten."""
    limit: int | None = None
    """Documents per benchmark, spread over its subjects."""
    chat_template: bool | None = None
    """None: on when the tokenizer has one."""
    max_new_tokens: int | None = None
    """Cuts answers earlier than the benchmarks do."""
    max_length: int | None = None
    """Tokens of prompt and answer; None: the model's context."""
    engine: EvalEngine = "transformers"
    tensor_parallel: int = 1
    """GPUs that hold one model, with vLLM."""
    memory_fraction: float = 0.9
    """vLLM: share of each GPU's memory (without a GPU: of the machine's) for weights and cache; not recorded."""
    batch_size: int | None = None
    """Requests at a time; None: as many as fit. Without effect on the result, but for the rounding of 16 bits."""
    dtype: DType = "auto"
