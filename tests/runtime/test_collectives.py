"""Gathering and scattering in two steps of rings: the same as in one; on TPU compiled as what they are."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rae_jax.profiling import chips, hlo_costs
from rae_jax.runtime import collectives, sharding


def test_every_pair_of_devices_meets():
    peers, neighbours = collectives.split(64)
    assert neighbours[0] == list(range(8)) and peers[1] == list(range(1, 64, 8))
    for size in (16, 24, 32, 64):
        steps = collectives.split(size)
        assert all(sorted(sum(groups, [])) == list(range(size)) for groups in steps)
        assert all(len(set(a) & set(b)) == 1 for a in steps[0] for b in steps[1])
    assert collectives.split(8) == collectives.split(17) == (None,)


@pytest.mark.parametrize("axis", [0, 1])
def test_two_steps_are_one(axis, monkeypatch):
    monkeypatch.setattr(collectives, "FEWEST", 4)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    spec = P(*(None,) * axis, "fsdp")
    x = jax.random.normal(jax.random.key(0), (24, 16, 3))

    def on_mesh(function, start, end):
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=start, out_specs=end, check_vma=False))(x)

    for steps in (collectives.split(8), (None,)):
        gathered = on_mesh(functools.partial(collectives._gather, axis=axis, rings=steps), spec, P())
        np.testing.assert_array_equal(gathered, x)
        # Every device has the same to add: eight times it.
        scattered = on_mesh(functools.partial(collectives._scatter, axis=axis, rings=steps), P(), spec)
        np.testing.assert_allclose(scattered, 8 * x, rtol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the extra 'tpu' is not installed")
def test_the_tpu_compiler_leaves_them_as_they_are():
    """Rows that fill no tile, over a whole slice of two axes: in one step both would be all-reduces."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 64, "tensor": 1}, chips.devices("v6e:8x8")[0])
    split = NamedSharding(mesh, P("fsdp"))

    def sent(function, x, out):
        mapped = jax.shard_map(function, mesh=mesh, in_specs=P("fsdp"), out_specs=out, check_vma=False)
        x = jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=split)
        compiled = jax.jit(lambda x: 2 * mapped(2 * x)).lower(x).compile()
        return {kind: size for kind, size in hlo_costs.Program(compiled.as_text()).costs().sent.items() if size}

    whole = 1152 * 3456 * 2 * 63 / 64
    gathered = sent(lambda part: collectives.gather(part, 0), (1152, 3456), P())
    assert gathered == {"all-gather": whole}
    scattered = sent(lambda whole: collectives.scatter(whole, 0), (64 * 1152, 3456), P("fsdp"))
    assert scattered.keys() <= {"reduce-scatter", "collective-permute"}  # what fills tiles up may move once more
    assert whole <= sum(scattered.values()) < 1.1 * whole
