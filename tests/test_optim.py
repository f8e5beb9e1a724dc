"""Optimisers against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny

from rae_jax import optim, sharding

RATE = 1e-2


def _first_update(name, params, grads):
    train = tiny().dit.train
    train.update({"optimizer": name, "learning_rate": RATE, "warmup_steps": 0, "clip_norm": 0.0})
    optimiser = optim.make(train)
    return optimiser.update(grads, optimiser.init(params), params)[0]


def test_muon_turns_the_blocks_kernels_by_the_gradients_singular_vectors():
    grads = {"blocks": {"kernel": jax.random.normal(jax.random.key(0), (3, 8, 12))}}
    updates = _first_update("muon", jax.tree.map(jnp.zeros_like, grads), grads)
    for grad, update in zip(grads["blocks"]["kernel"], updates["blocks"]["kernel"], strict=True):
        u, _, vt = np.linalg.svd(grad, full_matrices=False)
        values = -u.T @ update @ vt.T  # diagonal where the singular vectors are the same
        assert np.abs(values - np.diag(np.diag(values))).max() < 1e-4 * RATE
        # Five Newton-Schulz steps bring singular values near 1; 0.2 sqrt(12) gives the update AdamW's size.
        np.testing.assert_allclose(np.diag(values) / (RATE * 0.2 * np.sqrt(12)), 1.0, atol=0.35)


def test_muon_leaves_the_rest_to_adamw():
    shapes = {"embed": {"kernel": (4, 8)}, "blocks": {"bias": (3, 8)}, "norm": {"scale": (8,)}}
    shapes["head0"] = {"in_conv": {"kernel": (9, 4, 8)}}  # a discriminator's convolution
    grads = jax.tree.map(lambda shape: jax.random.normal(jax.random.key(1), shape), shapes, is_leaf=_is_shape)
    params = jax.tree.map(jnp.ones_like, grads)
    adamw = optax.nadamw(RATE, b1=0.9, b2=0.95, weight_decay=0.0)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5),
        _first_update("muon", params, grads),
        adamw.update(grads, adamw.init(params), params)[0],
    )


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_muon_on_a_mesh_is_muon_on_one_device(sizes):
    """It computes on whole matrices, which devices hold in parts."""
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    shapes = {"attention": {"qkv": {"kernel": (3, 64, 192)}, "proj": {"kernel": (3, 64, 64)}}}
    grads = {"blocks": jax.tree.map(lambda s: jax.random.normal(jax.random.key(0), s), shapes, is_leaf=_is_shape)}
    split = jax.device_put(grads, sharding.shardings(grads, mesh))
    assert not any(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(split))
    ours, expected = (jax.jit(lambda grads: _first_update("muon", grads, grads))(tree) for tree in (split, grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * RATE), ours, expected)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_leaves_the_time_embedding_s_frequencies(name):
    params = {"time_embed": {"frequencies": jnp.ones(4), "kernel": jnp.ones((4, 8))}}
    train = tiny().dit.train
    train.update({"optimizer": name, "weight_decay": 0.1, "warmup_steps": 0})
    optimiser = optim.make(train)
    updates, _ = optimiser.update(jax.tree.map(jnp.zeros_like, params), optimiser.init(params), params)
    assert not updates["time_embed"]["frequencies"].any() and (updates["time_embed"]["kernel"] < 0).all()


def test_each_average_has_its_own_decay():
    optimiser = optax.sgd(0.3)
    state = optim.init_state({"w": jnp.ones(3)}, optimiser, more_averages=2)
    params, averages = np.ones(3), [np.ones(3) for _ in range(3)]
    decays = (0.9, 0.5, 0.0)
    for n in range(4):
        grads = np.full(3, n + 1.0)
        state, _ = optim.update(state, {"w": jnp.asarray(grads)}, optimiser, decays[0], decays[1:])
        params = params - 0.3 * grads
        averages = [decay * average + (1 - decay) * params for decay, average in zip(decays, averages, strict=True)]
    found = [state["ema_params"], *state["more_ema_params"]]
    for ours, theirs in zip(found, averages, strict=True):
        np.testing.assert_allclose(ours["w"], theirs, rtol=1e-6)


def _is_shape(node):
    return isinstance(node, tuple)


@pytest.mark.parametrize("decay, middle", [("cosine", 0.5 * (1 + np.cos(np.pi / 2))), ("linear", 0.5)])
def test_schedule_warms_up_stays_and_decays(decay, middle):
    train = tiny().dit.train
    changes = {"learning_rate": 0.5, "final_learning_rate": 0.05, "warmup_steps": 10, "decay_start": 20}
    train.update({**changes, "num_steps": 40, "decay": decay})
    rate = optim.schedule(train)
    for step, expected in ((0, 0.0), (5, 0.25), (10, 0.5), (20, 0.5), (30, 0.05 + 0.45 * middle), (40, 0.05)):
        assert float(rate(step)) == pytest.approx(expected), step
