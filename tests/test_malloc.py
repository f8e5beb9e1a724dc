"""What the allocator keeps, seen in the pages that the kernel has to map."""

import ctypes
import resource
import subprocess
import sys
from pathlib import Path

import pytest

CHUNK, ROUNDS = 2**26, 20


def _faults():
    """Pages mapped while a large chunk is allocated, written and freed again and again."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(ROUNDS):
        chunk = libc.malloc(CHUNK)
        ctypes.memset(chunk, 1, CHUNK)
        libc.free(chunk)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_is_kept():
    setups = {"as it is": "", "kept": "malloc.keep_freed_memory(); "}
    found = {}
    for name, setup in setups.items():
        code = f"from rae_jax import malloc; import test_malloc; {setup}print(test_malloc._faults())"
        here = Path(__file__).parent
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here, check=True)
        found[name] = int(done.stdout)
    once = CHUNK // resource.getpagesize()
    assert found["as it is"] > 0.9 * ROUNDS * once
    assert found["kept"] < 1.1 * once
