"""What each stage can be told, with the defaults the command line shows; loads without torch.

An artifact records them as its configuration, and another value is another artifact (but for `save_steps`). Where
something is read or written is an argument of the stage.
"""

from dataclasses import dataclass, field
from typing import Literal

from tsdkd.core.config import TSDKDConfig
from tsdkd.errors import InputError

DType = Literal["auto", "float32", "bfloat16", "float16"]
"""Precision of weights and activations; "auto" is what the checkpoint was saved in."""
Engine = Literal["transformers", "vllm"]
Pair = Literal["qwen2.5", "gemma2", "qwen3"]
"""A teacher and a student of the paper, whose published numbers come along."""


@dataclass(frozen=True)
class GenerateConfig:
    """How responses are sampled."""

    policy: Literal["student", "teacher"] = "student"
    """Who answers: the student (on-policy, the paper's lambda = 1) or the teacher (off-policy)."""
    samples_per_prompt: int = 1
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: float = 1.0
    max_new_tokens: int = 512
    max_prompt_tokens: int = 512
    """Longer prompts are left out and counted; with 512 new tokens this is Table 10's length of 1024."""
    limit: int | None = None
    """Only the first so many prompts."""
    column: str | None = None
    """Column of the prompts file: messages or text. Default: messages, else prompt."""
    batch_size: int = 32
    part_size: int = 256
    """Responses per part file: what an interruption can cost. The seed is fixed per part."""
    dtype: DType = "auto"


@dataclass(frozen=True)
class ScoreConfig:
    """What of both models' views is recorded."""

    signal: Literal["hidden", "topk", "ranks"] = "hidden"
    """hidden: exact for any setting; topk: small, a lower bound of the divergence; ranks: no direct term."""
    k: int = TSDKDConfig.k
    """Candidates the student proposes at each position."""
    top_k: int = 64
    """Teacher log-probabilities per token with the signal "topk"."""
    batch_tokens: int = 8192
    """Tokens per forward, padding included."""
    dtype: DType = "auto"


@dataclass(frozen=True)
class TrainConfig:
    """How the student learns; defaults are Table 10's."""

    objective: TSDKDConfig = field(default_factory=TSDKDConfig)
    learning_rate: float = 5e-6
    epochs: float = 3.0
    batch_size: int = 128
    """Responses per optimizer step, over all processes."""
    micro_batch_size: int = 8
    """Responses per forward; does not change the result."""
    warmup_ratio: float = 0.1
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the forward; weights and optimizer are float32. "auto" is bf16 where the hardware has it."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """Fuse the objective's work between its matrix products; costs seconds at the start and needs a compiler."""
    save_steps: int = 100

    def __post_init__(self) -> None:
        for name, good, range_ in (
            ("epochs", self.epochs > 0, "above 0"),
            ("warmup_ratio", 0 <= self.warmup_ratio < 1, "in [0, 1)"),
            ("max_grad_norm", self.max_grad_norm > 0, "above 0; a large one switches clipping off"),
        ):
            if not good:
                raise InputError(f"{name} is {getattr(self, name)}.", f"Choose a value {range_}.")


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
    engine: Engine = "transformers"
    tensor_parallel: int = 1
    """GPUs that hold one model, with vLLM."""
    batch_size: int | None = None
    """Requests at a time; None: as many as fit. Without effect on the result, but for the rounding of 16 bits."""
    dtype: DType = "auto"


@dataclass(frozen=True)
class PruneConfig:
    """How many layers go, and how they are chosen."""

    drop: int = 1
    limit: int = 8
    """Prompts the choice is made on."""
    max_tokens: int = 256
    """Tokens of each."""
    column: str | None = None
    dtype: DType = "auto"
