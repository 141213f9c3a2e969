"""A reply for a child process of vLLM, which starts fast: nothing here imports torch."""

import os
import struct
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def end_early(pipe: Connection, arguments: dict[str, Any], _: Path | None = None) -> None:
    """End instead of sending hidden states (3, 4): `arguments["end"]` says when."""
    pipe.send([])
    pipe.poll(None)
    if arguments["end"] == "before the message is read":
        os._exit(0)
    pipe.recv()
    pipe.send(["float32", (3, 4)])
    if arguments["end"] == "within the states":
        os.write(pipe.fileno(), struct.pack("!i", 48) + bytes(10))
