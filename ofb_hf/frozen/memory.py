"""Give memory that is not used any more back to the system."""

import ctypes
import sys


def trim_memory() -> None:
    """Give back what this process has freed; where the C library does not offer that, nothing.

    glibc keeps freed blocks in between those that are still used, and takes new memory for blocks
    that are larger. After millions of them that is a multiple of what the process holds.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
