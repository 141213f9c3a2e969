"""What each stage can be told, with the defaults the command line shows; loads without torch.

An artifact records them as its configuration, and another value is another artifact (but for what changes speed
alone, and where a run is saved and logged). Where something is read or written is an argument of the stage.
"""

from typing import Literal

DType = Literal["auto", "float32", "bfloat16", "float16"]
"""Precision of weights and activations; "auto" is as it was saved; float32 on CPUs without bf16."""
EvalEngine = Literal["transformers", "vllm"]
Policy = Literal["student", "teacher", "mixed", "speculative", "teacher-mixed"]
EngineName = Literal["auto", "vllm", "transformers"]
