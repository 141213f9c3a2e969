"""`python -m tests.helpers.recipe_server FOLDER`: tsdkd for many short commands, with torch imported once.

Puts an executable `tsdkd` into the folder. Each call of it is a fork of this process, in the caller's directory and
environment, with its output and its exit status; the file `running` of the folder holds the fork's process id.
"""

import gc
import json
import os
import socket
import sys
from pathlib import Path

import peft
import transformers
import transformers.trainer
from lm_eval import evaluator

from tsdkd.cli import main
from tsdkd.stages.eval import stage as _eval
from tsdkd.stages.generate import stage as _generate
from tsdkd.stages.report import stage as _report
from tsdkd.stages.train import stage as _train

LOADED = (peft, transformers, evaluator, _eval, _generate, _report, _train)
CALLER = """#!{python} -SE
import json, os, socket, sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"."], [1, 2])
    server.sendall(json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode())
    server.shutdown(socket.SHUT_WR)
    sys.exit(int(server.recv(8) or 1))
"""


def serve(folder: Path) -> None:
    gc.freeze()  # a collection of a command neither searches nor copies what all share
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen()
        caller = folder / "tsdkd"
        caller.write_text(CALLER.format(python=sys.executable, address=str(folder / "socket")))
        caller.chmod(0o755)
        while True:
            with listener.accept()[0] as connection:
                connection.sendall(str(run_command(connection, folder / "running")).encode())


def run_command(connection: socket.socket, running: Path) -> int:
    """Run one command and return its exit status; 128 plus the signal's number if a signal ended it."""
    _, outputs, *_ = socket.recv_fds(connection, 1, 2)
    called = json.loads(b"".join(iter(lambda: connection.recv(65536), b"")))
    child = os.fork()
    if child == 0:
        become_command(*called, *outputs)
    running.write_text(str(child))
    for output in outputs:
        os.close(output)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if status >= 0 else 128 - status


def become_command(arguments: list[str], directory: str, environment: dict[str, str], stdout: int, stderr: int) -> None:
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w") for stream in (1, 2))  # the server's may be those of files
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    status: object = 1
    try:
        main()
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else int(status is not None))


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
