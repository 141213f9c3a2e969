"""Frames between two processes: a length and as many bytes."""

import os
import struct

from tsdkd.stages.eval.sandbox.codec import MAX_BYTES, CodecError

_LENGTH = struct.Struct(">I")


class Channel:
    """Two ends of pipes."""

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self.writing = reading, writing

    def send(self, frame: bytes) -> None:
        data = memoryview(_LENGTH.pack(len(frame)) + frame)
        while data:
            data = data[os.write(self.writing, data) :]

    def receive(self) -> bytes:
        """Raises EOFError when the other end is closed, CodecError for a frame that is too large."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > 2 * MAX_BYTES:
            raise CodecError("the frame is too large")
        return self._read(length)

    def _read(self, length: int) -> bytes:
        parts = []
        while length:
            part = os.read(self.reading, min(length, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            length -= len(part)
        return b"".join(parts)
