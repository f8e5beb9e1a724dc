"""The C library's allocator, set for a program that allocates the same large buffers at every step."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


def keep_freed_memory():
    """Have glibc keep freed memory for the next step; call it before JAX starts its threads. Elsewhere: nothing.

    XLA's CPU backend allocates and frees its buffers at every step, and glibc hands large ones back to the kernel,
    which maps and clears them again: a quarter of the time of a training step of the small DiT^DH.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)  # of the others, what lies free at the end is given back whatever the thresholds
        mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)  # a pass of DiT^DH-S on 4 images has one above 1 GiB
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
