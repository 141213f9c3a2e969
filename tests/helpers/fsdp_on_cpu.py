"""`python -m tests.helpers.fsdp_on_cpu COMMAND`: tsdkd, its processes taken for GPUs: accelerate gives FSDP to no others."""

from typing import Any
from unittest.mock import patch

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from tsdkd.cli import main

begin = AcceleratorState.__init__


def as_gpus(self: AcceleratorState, *arguments: Any, **settings: Any) -> None:
    PartialState(cpu=True)
    if PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    begin(self, *arguments, **settings)
    assert self.distributed_type == DistributedType.FSDP


with patch.object(AcceleratorState, "__init__", as_gpus):
    main()
