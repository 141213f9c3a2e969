"""`python -m tests.helpers.fsdp_on_cpu COMMAND` runs tsdkd with FSDP on CPUs, which accelerate offers on GPUs alone."""

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from tsdkd.cli import main

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
