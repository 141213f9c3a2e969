"""Choices that several configurations share.

An artifact records its configuration, and another value makes another artifact. Settings of speed, of saving and of
logging are not recorded. Paths are arguments of the stages.
"""

from typing import Literal

DType = Literal["auto", "float32", "bfloat16", "float16"]
"""Precision of weights and activations. "auto" keeps the saved precision, or takes float32 on CPUs without bfloat16."""
EvalEngine = Literal["transformers", "vllm"]
Policy = Literal["student", "teacher", "mixed", "speculative", "teacher-mixed"]
EngineName = Literal["auto", "vllm", "transformers"]

DTYPE_HELP = "Precision of the weights; auto: as saved, float32 on a CPU without bfloat16."
SAMPLING, BENCHMARKS, PRUNING, SCORING = "Sampling", "Benchmarks", "Pruning", "Scores"
DATA = "Inputs and outputs"
MODELS = "Models"
OBJECTIVE = "Objective (symbols of the paper; each method has some of them)"
OPTIMIZER = "Optimizer"
ONLINE = "Online training (with --prompts, --teacher or --lambda)"
REPLAY = "Replay (with --method distillm)"
LORA = "LoRA (with --lora)"
MONITORING = "Measurements, logs and saves"
SHOWN = "Selection of responses"
ENGINE = "Engine and precision"
VLLM = "vLLM"
COMPARISON = "Comparison"
GROUPS = (
    SAMPLING,
    SCORING,
    BENCHMARKS,
    PRUNING,
    SHOWN,
    DATA,
    MODELS,
    OBJECTIVE,
    OPTIMIZER,
    ONLINE,
    REPLAY,
    LORA,
    MONITORING,
    ENGINE,
    VLLM,
    COMPARISON,
)
"""Groups of options, in the order in which help shows them."""
