"""The ranks of a training run as forks of this process, which call what it has in memory: fakes, and deaths."""

import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

from accelerate.state import AcceleratorState

from tests.helpers.fsdp_on_cpu import FSDP, initialize_as_gpus
from tests.helpers.vllm_server import free_port

DDP: dict[str, str] = {}


def run_ranks(
    work: Callable[[], object],
    count: int,
    strategy: Mapping[str, str] = DDP,
    first: AbstractContextManager[object] | None = None,
) -> list[int]:
    """Run `work` on `count` ranks. Returns their exit codes; after a failure of one, the others are killed.

    `strategy`: `DDP` or `FSDP`. `first`: surrounds the work of rank 0.
    """
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    running = {}
    for rank in range(count):
        variables = shared | {"RANK": rank, "LOCAL_RANK": rank} if count > 1 else {}
        if (child := os.fork()) == 0:
            os.environ.update({name: str(value) for name, value in variables.items()} | strategy)
            _work(work, first if first and rank == 0 else nullcontext())
        running[child] = rank
    codes = [0] * count
    while running:
        for child, rank in list(running.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                del running[child]
                codes[rank] = os.waitstatus_to_exitcode(status)
                if codes[rank]:
                    for other in running:
                        os.kill(other, signal.SIGKILL)
        time.sleep(0.02)
    return codes


def _work(work: Callable[[], object], surrounding: AbstractContextManager[object]) -> None:
    """Never returns."""
    code = 1
    try:
        AcceleratorState._reset_state(reset_partial_state=True)
        if FSDP.items() <= os.environ.items():
            AcceleratorState.__init__ = initialize_as_gpus
        with surrounding:
            work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
