"""The C library's allocator on a CPU: it keeps freed buffers, so that the next step does not fault them in again."""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""
USER_SETTINGS = ("MALLOC_", "GLIBC_TUNABLES")
"""How the names of the environment variables that set the allocator begin."""


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory in this process. Returns whether it does.

    Without this, glibc returns each buffer of a step to the kernel, which clears the pages of the next one. Nothing
    changes under another C library, or if the environment sets the allocator.
    """
    if any(name.startswith(USER_SETTINGS) for name in os.environ) or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Large buffers come from the heap (no mmap), and the heap never shrinks.
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
