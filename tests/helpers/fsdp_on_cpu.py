"""`python -m tests.helpers.fsdp_on_cpu COMMAND` runs tsdkd with FSDP on CPUs, which accelerate offers on GPUs alone."""

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from tsdkd.cli import main

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
"""What `accelerate launch` sets from a configuration with FSDP2."""

initialize = AcceleratorState.__init__


def initialize_as_gpus(self: AcceleratorState, *arguments: Any, **settings: Any) -> None:
    PartialState(cpu=True)
    if PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    initialize(self, *arguments, **settings)
    assert self.distributed_type == DistributedType.FSDP


if __name__ == "__main__":
    AcceleratorState.__init__ = initialize_as_gpus
    main()
