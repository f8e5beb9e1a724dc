"""On an NVIDIA GPU, where there is one: kernels and whole steps compute what the CPU does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from rae_jax.models import mesh_matmul


def test_products_of_odd_sizes_are_products():
    """As GPUs run them, filled up with zeros to whole loads."""
    x, kernel, dy = jax.random.normal(jax.random.key(0), (2, 5, 13)), *jax.random.normal(jax.random.key(1), (2, 13, 21))
    dy = np.stack([dy[:5], dy[5:10]])
    np.testing.assert_allclose(mesh_matmul._times_aligned(x, kernel), x @ kernel, rtol=1e-5, atol=1e-5)
    outer = np.einsum("bnd,bnf->df", x, dy)
    np.testing.assert_allclose(mesh_matmul._outer_aligned(x, dy), outer, rtol=1e-5, atol=1e-5)
    assert mesh_matmul._aligned(x).shape == (2, 5, 16) and mesh_matmul._aligned(kernel, -2).shape == (16, 21)


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs an NVIDIA GPU")
def test_a_gpu_agrees_with_the_cpu():
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    environment["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"  # most of the compiling, for nothing here
    command = [sys.executable, str(tests / "gpu_agreement.py")]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line)
    assert len(found) == 6
    for name, value in found.items():
        assert value < (2e-2 if name.startswith("attention") else 1e-4), name  # attention is in bfloat16
