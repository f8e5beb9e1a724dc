"""Optimisers and schedules of a config against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny
from flax import traverse_util

from rae_jax.build import muon
from rae_jax.build import optimiser as build_optimiser
from rae_jax.runtime import sharding

RATE, WEIGHT_DECAY, B1, B2 = 1e-2, 0.1, 0.8, 0.95


def _last_update(name, params, *grads):
    """Return the update of the last of several gradients, all at the same parameters and the same rate."""
    train = tiny().dit.train
    train.update({"optimizer": name, "learning_rate": RATE, "final_learning_rate": RATE, "warmup_steps": 0})
    train.update({"clip_norm": 0.0, "weight_decay": WEIGHT_DECAY, "b1": B1, "b2": B2})
    optimiser = build_optimiser.optimiser(train)
    state = optimiser.init(params)
    for grad in grads:
        updates, state = optimiser.update(grad, state, params)
    return updates


def _normal(seed, shapes):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: np.float32(rng.normal(size=shape)), shapes, is_leaf=lambda node: isinstance(node, tuple)
    )


def test_muon_turns_the_blocks_kernels_by_the_gradients_singular_vectors():
    """In encoders and decoders, in the DiT's trunk and in its head; the kernels' weights decay as well."""
    shapes = {part: {"mlp": {"kernel": (2, 8, 12)}} for part in ("blocks", "trunk", "head")}
    params, grads = _normal(0, shapes), _normal(1, shapes)
    updates = jax.tree.map(lambda u, p: u + RATE * WEIGHT_DECAY * p, _last_update("muon", params, grads), params)
    matrices = (np.concatenate(jax.tree.leaves(tree)) for tree in (grads, updates))
    for grad, update in zip(*matrices, strict=True):
        u, _, vt = np.linalg.svd(grad, full_matrices=False)
        values = -u.T @ update @ vt.T  # diagonal where the singular vectors are the same
        assert np.abs(values - np.diag(np.diag(values))).max() < 1e-4 * RATE
        # Five Newton-Schulz steps bring singular values near 1; 0.2 sqrt(12) gives the update AdamW's size.
        np.testing.assert_allclose(np.diag(values) / (RATE * 0.2 * np.sqrt(12)), 1.0, atol=0.35)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_adamw_is_its_equations_also_for_what_muon_leaves(name):
    """After three gradients, so that both betas count. As a part of Muon, AdamW has Nesterov's momentum."""
    shapes = {"embed": {"kernel": (4, 8)}, "blocks": {"bias": (3, 8)}, "norm": {"scale": (8,)}}
    shapes["head0"] = {"in_conv": {"kernel": (9, 4, 8)}}  # a discriminator's convolution
    params, grads = _normal(0, shapes), [_normal(seed, shapes) for seed in (1, 2, 3)]

    def expected(param, *grads):
        first, second = np.zeros(param.shape), np.zeros(param.shape)
        for grad in np.float64(grads):
            first, second = B1 * first + (1 - B1) * grad, B2 * second + (1 - B2) * grad**2
        mean = first / (1 - B1**3)
        if name == "muon":
            mean = B1 * first / (1 - B1**4) + (1 - B1) * grad / (1 - B1**3)
        return -RATE * (mean / (np.sqrt(second / (1 - B2**3)) + 1e-8) + WEIGHT_DECAY * param)

    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * RATE),
        _last_update(name, params, *grads),
        jax.tree.map(expected, params, *grads),
    )


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_muon_on_a_mesh_is_muon_on_one_device(sizes):
    """It computes on whole matrices, which devices hold in parts."""
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    shapes = {"attention": {"qkv": {"kernel": (3, 64, 192)}, "proj": {"kernel": (3, 64, 64)}}}
    grads = {"blocks": _normal(0, shapes)}
    split = jax.device_put(grads, sharding.shardings(grads, mesh))
    assert not any(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(split))
    ours, expected = (jax.jit(lambda grads: _last_update("muon", grads, grads))(tree) for tree in (split, grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * RATE), ours, expected)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_leaves_the_time_embedding_s_frequencies(name):
    params = {"time_embed": {"frequencies": jnp.ones(4), "kernel": jnp.ones((4, 8))}}
    train = tiny().dit.train
    train.update({"optimizer": name, "weight_decay": 0.1, "warmup_steps": 0})
    optimiser = build_optimiser.optimiser(train)
    updates, _ = optimiser.update(jax.tree.map(jnp.zeros_like, params), optimiser.init(params), params)
    assert not updates["time_embed"]["frequencies"].any() and (updates["time_embed"]["kernel"] < 0).all()


@pytest.mark.parametrize("warmup, decay_start", [(10, 20), (10, 0), (0, 20), (0, 0)])
@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_schedule_warms_up_stays_and_decays(decay, warmup, decay_start):
    """Without a constant stretch as well: then it decays from the warm-up's end."""
    train, begins = tiny().dit.train, max(warmup, decay_start)
    changes = {"learning_rate": 0.5, "final_learning_rate": 0.05, "warmup_steps": warmup, "decay_start": decay_start}
    train.update({**changes, "num_steps": 40, "decay": decay})
    steps = np.arange(50)
    part = np.clip((steps - begins) / (40 - begins), 0.0, 1.0)
    left = 1 - part if decay == "linear" else 0.5 * (1 + np.cos(np.pi * part))
    expected = np.where(steps < warmup, 0.5 * steps / max(warmup, 1), 0.05 + 0.45 * left)
    np.testing.assert_allclose(jax.vmap(build_optimiser.schedule(train))(steps), expected, rtol=1e-5, atol=1e-7)


MATRICES = {  # of 'muon_all', {path: (shape, matrices that the kernel joins)}
    "trunk/attention/qkv/kernel": ((2, 8, 24), 3),
    "base/attention/proj/kernel": ((2, 8, 8), 1),
    "head/mlp/w12/kernel": ((2, 8, 20), 2),
    "head/mlp/w3/kernel": ((2, 10, 8), 1),
    "head/modulation/linear/kernel": ((2, 8, 48), 1),
    "time_embed/fc1/kernel": ((16, 8), 1),
    "condition_proj/kernel": ((8, 12), 1),
    "final_layer/linear/kernel": ((12, 5), 1),
    "label_embed/table": ((11, 8), 1),
    "label_embed/tokens": ((4, 8), 1),
    "time_tokens": ((3, 8), 1),
}
OTHERS = {
    **{"trunk_embed/kernel": (5, 8), "head_embed/kernel": (5, 12), "trunk/attention/qkv/bias": (2, 24)},
    **{"trunk/norm1/scale": (2, 8), "head0/in_conv/kernel": (9, 4, 8)},
}


def _muon_in_float64(params, first, second):
    """The update of one matrix [in, out] after two gradients, by the equations."""
    moment = 0.05 * 0.95 * np.float64(first) + 0.05 * np.float64(second)
    x = 0.95 * moment / (1 - 0.95**3) + 0.05 * np.float64(second) / (1 - 0.95**2)
    x = x / np.linalg.norm(x)
    for a, b, c in muon.POLAR_EXPRESS:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return -RATE * (0.2 * np.sqrt(max(x.shape)) * x + WEIGHT_DECAY * np.float64(params))


def test_muon_for_all_matrices_is_its_equations():
    shapes = traverse_util.unflatten_dict({**{k: v[0] for k, v in MATRICES.items()}, **OTHERS}, sep="/")
    params, first, second = (_normal(seed, shapes) for seed in range(3))
    flat = [traverse_util.flatten_dict(tree, sep="/") for tree in (params, first, second)]
    ours = traverse_util.flatten_dict(_last_update("muon_all", params, first, second), sep="/")
    for path, (shape, parts) in MATRICES.items():
        inputs = [tree[path].reshape(-1, *shape[-2:]) for tree in flat]
        blocks = [
            np.concatenate(
                [_muon_in_float64(*part) for part in zip(*(np.split(a, parts, -1) for a in block), strict=True)], -1
            )
            for block in zip(*inputs, strict=True)
        ]
        np.testing.assert_allclose(ours[path], np.reshape(blocks, shape), rtol=2e-4, atol=2e-4 * RATE, err_msg=path)
    adamw = traverse_util.flatten_dict(_last_update("adamw", params, first, second), sep="/")
    for path in OTHERS:
        np.testing.assert_allclose(ours[path], adamw[path], rtol=1e-6, err_msg=path)


def test_the_moments_of_muon_for_all_matrices_have_the_shapes_of_the_parameters():
    train = tiny().dit.train
    train.optimizer = "muon_all"
    params = _normal(0, traverse_util.unflatten_dict({k: v[0] for k, v in MATRICES.items()}, sep="/"))
    state = build_optimiser.optimiser(train).init(params)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)} - {(), (5, 3)}
    assert shapes == {leaf.shape for leaf in jax.tree.leaves(params)}
    sharding.shardings(jax.eval_shape(lambda: state), sharding.make_mesh({"data": 4, "fsdp": 2, "tensor": 1}))


def test_a_rate_may_be_constant_fall_and_be_constant_again():
    """RAEv2's: 2e-4 to epoch 25, linear to 2e-5 at epoch 50, constant to epoch 80."""
    train = tiny().dit.train
    train.update({"learning_rate": 2e-4, "final_learning_rate": 2e-5, "warmup_steps": 0, "num_steps": 80})
    train.update({"decay_start": 25, "decay_end": 50, "decay": "linear"})
    rate = build_optimiser.schedule(train)
    found = [float(rate(step)) for step in (0, 24, 25, 30, 49, 50, 79)]
    expected = [2e-4, 2e-4, 2e-4, 2e-4 - 1.8e-4 * 5 / 25, 2e-4 - 1.8e-4 * 24 / 25, 2e-5, 2e-5]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
