"""The C library's allocator, set for a program that allocates the same large buffers at every step."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


def keep_freed_memory():
    """Make glibc keep freed memory for the next step; call it before JAX starts its threads. Without glibc: do nothing.

    XLA's CPU backend allocates and frees its buffers at every step. By default glibc returns large buffers to the
    kernel, which maps and clears them again: a quarter of the time of a training step of the small DiT^DH.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)  # other arenas return free memory at their end, whatever the thresholds
        mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)  # a pass of DiT^DH-S on 4 images has a buffer above 1 GiB
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
