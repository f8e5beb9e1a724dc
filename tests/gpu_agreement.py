"""How far a GPU's results are from others': largest differences over the largest values, a line of JSON each.

In a process of its own, with JAX_PLATFORMS=cuda,cpu, since the tests see only the CPU; test_gpu.py calls it.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from conftest import tiny

from rae_jax.models import attention, mesh_matmul
from rae_jax.profiling import timing
from rae_jax.runtime import sharding

jax.config.update("jax_platforms", "cuda,cpu")  # conftest, imported for the tiny config, has set it to cpu


def main():
    for shape in ((2, 256, 16, 72), (2, 261, 12, 64)):
        say(f"attention {shape}", cudnn_attention(shape))
    say("products of odd sizes", odd_products())
    for name in ("train_dit", "sample", "train_decoder"):
        say(name, program(name))


def say(name, value):
    print(json.dumps({name: value}), flush=True)


def cudnn_attention(shape):
    """Return the difference of values and gradients in bfloat16 from XLA's in float32."""

    def values(attend, dtype):
        q, k, v, cotangent = (a.astype(dtype) for a in jax.random.normal(jax.random.key(0), (4, *shape), jnp.bfloat16))
        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(cotangent)

    return difference(jax.jit(lambda: values(attention.cudnn, jnp.bfloat16))(), values(attention.xla, jnp.float32))


def odd_products():
    """Return the difference of a product with 13 and 21 channels, and of its gradients, from numpy's."""
    x, kernel, dy = (
        np.random.default_rng(0).standard_normal(s, np.float32) for s in ((2, 5, 13), (13, 21), (2, 5, 21))
    )
    y, pullback = jax.vjp(jax.jit(lambda x, kernel: mesh_matmul.product(x, kernel, "kernel")[0]), x, kernel)
    rows, outer = x.reshape(-1, 13), jax.jit(mesh_matmul._outer)(x, dy)
    expected = (x @ kernel, dy @ kernel.T, rows.T @ dy.reshape(-1, 21))
    return difference((y, *pullback(dy), outer), (*expected, expected[-1]))


def program(name):
    """Return the difference of a run on the GPU from one on the CPU, with the same inputs and random numbers."""
    config = tiny()
    config.decoder.train.lpips_weight = 0.0

    def on(device):
        mesh = sharding.make_mesh(config.mesh, [device])
        found = timing.PROGRAMS[name](config, mesh)
        first, *rest = found.arguments
        first = timing.late_state(first) if found.kind == "train" else timing.made_up(first)
        arguments = (first, *map(timing.made_up, rest))
        return jax.device_get(found.jitted(*arguments))

    return difference(on(jax.devices("cuda")[0]), on(jax.devices("cpu")[0]))


def difference(ours, theirs):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    arrays = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    # By numpy, which keeps what is not a number; max() may pass over it.
    return float(np.max([np.abs(a - b).max() / (np.abs(b).max() + 1e-12) for a, b in arrays]))


if __name__ == "__main__":
    main()
