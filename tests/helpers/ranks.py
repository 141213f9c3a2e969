"""Two ranks of a command as forks of one process that has imported torch.

They get what torchrun sets: `torchrun --standalone --nproc-per-node=2 -m MODULE`, without a new Python for each rank.
Nothing here imports tsdkd.cli, which reads its rank when it is imported.
"""

import gc
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import peft
import torch
import transformers.trainer

from tests.helpers.vllm_server import free_port
from tsdkd.stages.score import stage as _score
from tsdkd.stages.train import stage as _train

LOADED = (peft, transformers.trainer, _score, _train)


class Launcher:
    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def launch(self, module: str, words: list[str], environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
        """Run `python -m MODULE WORDS` as two ranks; the return code is 0 if that of both is 0."""
        with TemporaryDirectory() as directory:
            outputs = Path(directory, "stdout"), Path(directory, "stderr")
            statuses = self._pool.submit(_launch, module, words, environment, outputs).result()
            status = max(map(abs, statuses))
            return subprocess.CompletedProcess(words, status, *(path.read_text() for path in outputs))


@contextmanager
def open_launcher() -> Iterator[Launcher]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield Launcher(pool)


def _launch(module: str, words: list[str], environment: dict[str, str], outputs: tuple[Path, Path]) -> list[int]:
    """The exit statuses of both ranks. Like torchrun, it ends the other rank when one fails."""
    torch.set_num_threads(1)
    gc.freeze()  # a collection of a rank neither searches nor copies what both share
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in ("0", "1"):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            _be_rank(module, words, environment | port | numbers, outputs)
    gc.unfreeze()
    statuses = {}
    for _ in ranks:
        ended, status = os.wait()
        statuses[ended] = os.waitstatus_to_exitcode(status)
        for other in set(ranks) - statuses.keys():
            if statuses[ended]:
                os.kill(other, signal.SIGTERM)
    return [statuses[rank] for rank in ranks]


def _be_rank(module: str, words: list[str], environment: dict[str, str], outputs: tuple[Path, Path]) -> None:
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ |= environment
    signal.alarm(600)  # ranks that wait for each other would wait forever
    sys.argv = [module, *words]
    status: object = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else int(status is not None))
