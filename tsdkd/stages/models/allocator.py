"""Keeps freed memory in the process, so that the next step does not fault it in again."""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""
USER_SETTINGS = ("MALLOC_", "GLIBC_TUNABLES")
"""Prefixes of environment variables that set the allocator."""


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory in this process. Returns whether it does.

    By default, glibc returns each buffer of a step to the kernel, which clears the pages of the next one. Nothing
    changes with another C library, or if the environment sets the allocator.
    """
    if any(name.startswith(USER_SETTINGS) for name in os.environ) or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # no mmap for large buffers; the heap never shrinks
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
