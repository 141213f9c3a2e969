"""Runs a program and its tests in two confined processes, and ends both.

    python -I -B supervisor.py PARENT-PROCESS WALL-SECONDS CPU-SECONDS < inputs > outcome

Inputs and outcome are values of the codec. The program's process is forked before the inputs are read, so that it never
holds the tests. All three processes end with the parent.
"""

import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).parents[4]))

from tsdkd.stages.eval.sandbox.channel import Channel
from tsdkd.stages.eval.sandbox.codec import Decoder, Encoder
from tsdkd.stages.eval.sandbox.confinement import NOT_CONFINED, Confinement, end_with, hide_memory
from tsdkd.stages.eval.sandbox.judge import Judge
from tsdkd.stages.eval.sandbox.program import Program

del sys.path[0]

VERDICT_BYTES = 1 << 16


def supervise(wall_seconds: float, cpu_seconds: int) -> dict[str, object]:
    """Run the program and its tests. Returns the verdict as bytes, empty without one, and how both processes ended."""
    confinement = Confinement(cpu_seconds)
    requests, replies, verdict = os.pipe(), os.pipe(), os.pipe()

    def run_program() -> None:
        Program(Channel(requests[0], replies[1])).serve()

    def run_judge() -> None:
        with os.fdopen(0, "rb") as file:
            inputs = Decoder(_no_object).decode(file.read())
        result = Judge(Channel(replies[0], requests[1])).run_tests(inputs)
        os.write(verdict[1], Encoder(_no_object).encode(result))

    program = _fork(run_program, confinement, {requests[0], replies[1]})
    judge = _fork(run_judge, confinement, {0, replies[0], requests[1], verdict[1]})
    for descriptor in (0, *requests, *replies, verdict[1]):
        os.close(descriptor)
    timed_out = not select.select([verdict[0]], [], [], wall_seconds)[0]
    found = b"" if timed_out else os.read(verdict[0], VERDICT_BYTES)
    statuses = _wait_briefly(program), _wait_briefly(judge)
    return {"verdict": found, "timed_out": timed_out, "program": statuses[0], "judge": statuses[1]}


def _fork(run: Callable[[], None], confinement: Confinement, kept: set[int]) -> int:
    """Run a function in a confined process that has the descriptors `kept`, and no other open file."""
    parent = os.getpid()
    process = os.fork()
    if process:
        return process
    try:
        end_with(parent)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in {0, 1, 2} - kept:
            os.dup2(null, descriptor)
        for descriptor in set(range(3, 64)) - kept - {confinement.landlock}:
            os.closerange(descriptor, descriptor + 1)  # no error if it is closed
        confinement.enter()
    except OSError:
        os._exit(NOT_CONFINED)
    try:
        run()
    finally:
        os._exit(0)


def _wait_briefly(process: int) -> int | None:
    """The exit code of a process that ends by itself, negative for a signal, or None after killing it."""
    for _ in range(50):
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def _no_object(*_: object) -> NoReturn:
    raise ValueError("inputs and verdict hold values only")


def _main() -> None:
    parent, wall_seconds, cpu_seconds = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    sys.argv = ["program.py"]
    try:
        end_with(parent)
        hide_memory()
        outcome = supervise(wall_seconds, cpu_seconds)
    except (OSError, AttributeError) as error:  # a system without libseccomp or prctl
        outcome = {"not_confined": str(error)}
    os.write(1, Encoder(_no_object).encode(outcome))


if __name__ == "__main__":
    _main()
