"""Gathering and scattering over the mesh's fsdp axis, inside a shard_map; on TPU in two steps of rings.

The TPU compiler turns a scattered sum over a whole slice of two or three axes (v6e:4x4, v6e:8x8, v5p:4x4x4) into an
all-reduce, which sends twice as much, and there gathers small arrays by one of zeros, too. Over groups of neighbours,
and then over those of their peers, it leaves both as they are, and what is sent is the same as in one ring.
"""

import functools
import math

import jax

AXIS = "fsdp"
FEWEST = 16  # devices; among fewer one ring is left as it is


def gather(part, axis):
    """The parts of all devices side by side along `axis`."""
    one, two = (functools.partial(_gather, axis=axis, rings=rings) for rings in ((None,), _rings()))
    return jax.lax.platform_dependent(part, tpu=two, default=one)


def scatter(whole, axis):
    """This device's part, along `axis`, of the sum over all devices."""
    one, two = (functools.partial(_scatter, axis=axis, rings=rings) for rings in ((None,), _rings()))
    return jax.lax.platform_dependent(whole, tpu=two, default=one)


def _rings():
    return split(jax.lax.axis_size(AXIS))


def split(size):
    """The steps, outer one first, in which `size` devices meet: for each the groups of their indices; None: all."""
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
    # Along axes of their own: rows that do not fill the tiles of a TPU's memory are gathered by an all-reduce else.
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
