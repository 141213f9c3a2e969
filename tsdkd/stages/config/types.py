"""Choices that several configurations share.

An artifact records its configuration: another value makes another artifact. Settings of speed, saving and logging are
not recorded. Paths are arguments of the stages.
"""

from typing import Literal

DType = Literal["auto", "float32", "bfloat16", "float16"]
"""Precision of weights and activations. "auto" keeps the saved precision, or takes float32 on CPUs without bfloat16."""
EvalEngine = Literal["transformers", "vllm"]
Policy = Literal["student", "teacher", "mixed", "speculative", "teacher-mixed"]
EngineName = Literal["auto", "vllm", "transformers"]

DTYPE_HELP = "Precision of the weights; auto: as saved, float32 on a CPU without bfloat16."
