"""Choices that several configurations share.

An artifact records its configuration: another value makes another artifact. Settings of speed, saving and logging are
not recorded. Paths are arguments of the stages.
"""

from typing import Any, Literal

from tsdkd.stages.config.groups import ENGINE
from tsdkd.stages.config.option import option

DType = Literal["auto", "float32", "bfloat16", "float16"]
"""Precision of weights and activations. "auto" keeps the saved precision, or takes float32 on CPUs without bfloat16."""
EvalEngine = Literal["transformers", "vllm"]
Policy = Literal["student", "teacher", "mixed", "speculative", "teacher-mixed", "given"]
Turns = Literal["all", "last"]
EngineName = Literal["auto", "vllm", "transformers"]
QuantizedBits = Literal["4bit", "8bit"]
"""Bits of a frozen model's weights: nf4 with double quantisation, or integers with a scale per row."""


def attention_option() -> Any:
    """The field `attention`, for all models that a command loads with transformers."""
    return option(
        None,
        "Attention implementation of transformers, such as eager, sdpa or flash_attention_2; one that would change the "
        "model's attention is refused.",
        group=ENGINE,
        metavar="NAME",
        shown="eager on CPUs and where sdpa differs, else sdpa",
    )


def data_parallel_option() -> Any:
    """The field `data_parallel`, of commands whose tasks several processes share; not recorded."""
    return option(
        None,
        "Processes that share the work, each with GPUs of its own; the content does not depend on their number.",
        group=ENGINE,
        min_=1,
        shown="1; with --ray, as many as fit",
    )


def ray_option() -> Any:
    """The field `ray`, of the same commands; not recorded. The command line turns a missing value into "auto"."""
    return option(
        None,
        "Share the work over a Ray cluster; without an address, the running one, or a new one on this machine.",
        group=ENGINE,
        metavar="[ADDRESS]",
        shown="this machine alone",
    )


DTYPE_HELP = "Precision of the weights; auto: as saved, float32 on a CPU without bfloat16."
