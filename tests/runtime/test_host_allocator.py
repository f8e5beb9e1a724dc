"""The memory that the allocator keeps, seen in the pages that the kernel has to map."""

import ctypes
import resource
import subprocess
import sys
from pathlib import Path

import pytest


def _faults(size, rounds):
    """Pages mapped while a large chunk is allocated, written and freed again and again."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        chunk = libc.malloc(size)
        ctypes.memset(chunk, 1, size)
        libc.free(chunk)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
@pytest.mark.parametrize("size, rounds", [(2**26, 20), pytest.param(3 * 2**29, 3, marks=pytest.mark.slow)])
def test_freed_memory_is_kept(size, rounds):
    setups = {"as it is": "", "kept": "host_allocator.keep_freed_memory(); "}
    found = {}
    for name, setup in setups.items():
        imports = "from rae_jax.runtime import host_allocator; from test_host_allocator import _faults"
        code = f"{imports}; {setup}print(_faults({size}, {rounds}))"
        here = Path(__file__).parent
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here, check=True)
        found[name] = int(done.stdout)
    once = size // resource.getpagesize()
    assert found["as it is"] > 0.9 * rounds * once
    assert found["kept"] < 1.1 * once
