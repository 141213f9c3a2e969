"""How child processes end: with their parent, and in order."""

import multiprocessing
import os
import signal
import threading
from typing import Any, NoReturn


def follow_parent() -> None:
    """Make this child end with its parent, also when that is killed.

    It ignores Ctrl-C, which reaches the whole group: the parent ends its children. SIGTERM closes what is open.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _raise_system_exit)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _raise_system_exit(*_: Any) -> NoReturn:
    raise SystemExit


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
