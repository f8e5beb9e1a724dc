"""Gathering and scattering over the mesh's fsdp axis, inside a shard_map; on TPU in two steps of rings.

The TPU compiler turns a scattered sum over a whole slice of two or three axes (v6e:4x4, v6e:8x8, v5p:4x4x4) into an
all-reduce, which sends twice as much. On these slices it also gathers small arrays by an all-reduce of zeros. In two
steps, over groups of neighbours and then over groups of their peers, the compiler keeps both operations, and the bytes
sent are the same as in one ring.
"""

import functools
import math

import jax

AXIS = "fsdp"
FEWEST = 16  # devices; fewer devices use one ring


def gather(part, axis):
    """Return the parts of all devices, concatenated along `axis`."""
    one, two = (functools.partial(_gather, axis=axis, rings=rings) for rings in ((None,), _rings()))
    return jax.lax.platform_dependent(part, tpu=two, default=one)


def scatter(whole, axis):
    """Return this device's part, along `axis`, of the sum over all devices."""
    one, two = (functools.partial(_scatter, axis=axis, rings=rings) for rings in ((None,), _rings()))
    return jax.lax.platform_dependent(whole, tpu=two, default=one)


def _rings():
    return split(jax.lax.axis_size(AXIS))


def split(size):
    """Return each step's groups of device indices, outer step first, of `size` devices; None: one group of all."""
    inner = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    if size < FEWEST or inner == 1:
        return (None,)
    outer = size // inner
    peers = [[o * inner + i for o in range(outer)] for i in range(inner)]
    neighbours = [[o * inner + i for i in range(inner)] for o in range(outer)]
    return peers, neighbours


def _gather(part, *, axis, rings):
    if axis > 0:
        for groups in reversed(rings):
            part = jax.lax.all_gather(part, AXIS, axis=axis, tiled=True, axis_index_groups=groups)
        return part
    # Gather along new axes: otherwise rows that do not fill the tiles of a TPU's memory are gathered by an all-reduce.
    rest = part.shape[1:]
    for groups in reversed(rings):
        part = jax.lax.all_gather(part, AXIS, axis_index_groups=groups)
    return part.reshape(-1, *rest)


def _scatter(whole, *, axis, rings):
    for groups in rings:
        ways = len(groups[0]) if groups else jax.lax.axis_size(AXIS)
        if axis > 0:
            options = {"scatter_dimension": axis, "tiled": True}
        else:
            whole, options = whole.reshape(ways, -1, *whole.shape[1:]), {}
        whole = jax.lax.psum_scatter(whole, AXIS, axis_index_groups=groups, **options)
    return whole
