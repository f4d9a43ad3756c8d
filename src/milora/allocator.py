"""What is freed on a CPU goes back to the system, so that a run takes the memory of its tensors.

glibc takes blocks that are large from the system one by one, and gives them back when they are
freed; what is smaller lies in a heap, which shrinks only from its end. What counts as large grows
with what a program frees, up to 32 MB (mallopt(3)): then nearly all activations lie in the heap,
and holes between them stay with the process.
"""

import ctypes
import os
from contextlib import suppress

LARGE = 1 << 20  # bytes
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def give_back_freed() -> bool:
    """Fix glibc's thresholds for the rest of the process; whether it has been done.

    Not where the C library is another, or where the user has set them (MALLOC_MMAP_THRESHOLD_,
    GLIBC_TUNABLES).
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "glibc.malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    ):
        return False
    with suppress(OSError, AttributeError, TypeError):  # no library, or none with mallopt
        library = ctypes.CDLL(None)
        return all(
            library.mallopt(what, LARGE) == 1 for what in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)
        )
    return False
