"""Muon against optax's, and the sharing of its matrices by the devices of a mesh."""

import jax
import numpy as np
import optax
import optax.contrib
import pytest

from rae_jax.build import muon
from rae_jax.profiling import hlo_costs, jaxpr_flops
from rae_jax.runtime import sharding

RATE = 1e-2
OPTIONS = {"b1": 0.8, "b2": 0.95, "weight_decay": 0.1}
SHAPES = {
    "blocks": {
        "qkv": {"kernel": (6, 64, 192)},
        "proj": {"kernel": (6, 64, 64)},
        "w12": {"kernel": (6, 64, 182)},
        "w3": {"kernel": (6, 91, 64)},  # 91: no axis of the mesh divides it
        "norm": {"scale": (6, 64)},
    },
    "embed": {"table": (11, 64)},
}


def _parts(path, param):
    """Return one matrix for each kernel and the table: as optax, which sees no parts in a kernel."""
    return int(path[-1].key in ("kernel", "table"))


def _dimensions(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1) if _parts(path, x) else None, params
    )


def _normal(seed):
    rng = np.random.default_rng(seed)
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: np.float32(rng.normal(size=shape)), SHAPES, is_leaf=is_shape)


@pytest.mark.parametrize("coefficients", [muon.NEWTON_SCHULZ, muon.POLAR_EXPRESS], ids=["standard", "polar express"])
def test_muon_is_optax_s(coefficients):
    """Updates and state, whose tree is the same: runs made with optax.contrib.muon can go on."""
    ours = muon.muon(RATE, coefficients, _parts, **OPTIONS)
    theirs = optax.contrib.muon(
        RATE,
        coefficients,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_dimensions,
        **{f"adam_{name}": value for name, value in OPTIONS.items()},
        weight_decay=OPTIONS["weight_decay"],
    )
    params = _normal(0)
    states = [optimiser.init(params) for optimiser in (ours, theirs)]
    for seed in (1, 2, 3):
        steps = [o.update(_normal(seed), state, params) for o, state in zip((ours, theirs), states, strict=True)]
        (found, expected), states = (updates for updates, _ in steps), [state for _, state in steps]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * RATE), found, expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *states)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 4, 1), (2, 2, 2), (8, 1, 1)], ids=str)
def test_devices_of_a_mesh_share_the_matrices(sizes):
    """Same update as on one device, with q, k and v apart; and no device computes more than its part."""
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    parts = {"qkv": 3, "w12": 2}
    optimiser = muon.muon(
        RATE, muon.POLAR_EXPRESS, lambda path, x: parts.get(path[-2].key, 1) if _parts(path, x) else 0, **OPTIONS
    )
    grads = _normal(1)
    state = optimiser.init(grads)

    def update(grads, state):
        return optimiser.update(grads, state, grads)[0]

    placed = sharding.shardings((grads, state), mesh)
    split = jax.device_put((grads, state), placed)
    assert sizes[1] == 1 or not split[0]["blocks"]["qkv"]["kernel"].sharding.is_fully_replicated
    compiled = sharding.jit(update, mesh, in_shardings=placed, out_shardings=placed[0]).lower(*split).compile()
    expected = jax.jit(update)(grads, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * RATE), compiled(*split), expected)
    done = hlo_costs.Program(compiled.as_text()).costs().flops
    # 24 matrices of 64 x 64 on 8 devices, 18 of 64 x 91 padded to 96 columns.
    assert done <= 1.25 * jaxpr_flops.count(update, grads, state) / mesh.size
