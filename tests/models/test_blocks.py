"""Compute dtypes; scanned, unrolled and rematerialised blocks; layers."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny
from flax import linen as nn

from rae_jax.build import models as models_lib
from rae_jax.models import attention, layers
from rae_jax.models.dense import Dense
from rae_jax.training.encoder import magnify_detail


def _models(**changes):
    config = tiny()
    config.update(changes)
    config.decoder.depth = config.dit.depth = 2
    autoencoder = models_lib.autoencoder(config)
    models = {"encoder": autoencoder.encoder, "decoder": autoencoder.decoder, "dit": models_lib.dit(config)}
    config.dit.head_depth = 0
    return {**models, "plain_dit": models_lib.dit(config)}


def _random_params(model, arguments):
    """Random weights in every layer: layers that start at zero would hide errors."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *arguments)
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return structure.unflatten([0.2 * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves, strict=True)])


def _arguments(name):
    key = jax.random.key(2)
    match name:
        case "encoder":
            return (jax.random.normal(key, (2, 32, 32, 3)),)
        case "decoder":
            return (jax.random.normal(key, (2, 8, 8, 16)),)
        case "dit" | "plain_dit":
            return jax.random.normal(key, (2, 8, 8, 16)), jnp.array([0.3, 0.8]), jnp.array([1, 10])


_CHOICES = (
    *({"unroll": True}, {"remat": "full"}, {"remat": "dots"}, {"unroll": True, "remat": "dots"}),
    {"remat": "dots", "attend": attention.recomputed},
)


@pytest.mark.parametrize(
    "name, choices",
    [
        ("decoder", _CHOICES[4:]),
        *(pytest.param(name, _CHOICES, marks=pytest.mark.slow) for name in ("encoder", "decoder", "dit", "plain_dit")),
    ],
)
def test_scanned_unrolled_and_rematerialised_blocks_agree(name, choices):
    """Compare the outputs and the gradients of every parameter."""
    arguments = _arguments(name)
    params = _random_params(_models()[name], arguments)

    def outcome(model):
        def loss(params):
            out = model.apply(params, *arguments)
            return jnp.sin(out).sum(), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    expected = outcome(_models()[name])
    for choice in choices:
        found = outcome(_models(**choice)[name])
        for (path, a), b in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True):
            assert jnp.abs(a - b).max() <= 1e-6 * jnp.abs(a).max(), (choice, jax.tree_util.keystr(path))


@pytest.mark.parametrize("name, blocks", [("plain_dit", "blocks"), ("dit", "trunk")])
def test_a_diffusion_transformer_hands_out_the_tokens_after_blocks(name, blocks):
    """Tokens have the order of `layers`, the prediction stays. A model of depth 1 has the first block's tokens."""
    model, arguments = _models()[name], _arguments(name)
    params = _random_params(model, arguments)
    shallow = {"params": {**params["params"], blocks: jax.tree.map(lambda x: x[:1], params["params"][blocks])}}
    y, tokens = jax.jit(functools.partial(model.apply, layers=(1, 0)))(params, *arguments)
    _, (first,) = jax.jit(functools.partial(model.clone(depth=1).apply, layers=(0,)))(shallow, *arguments)
    expected = jax.jit(model.apply)(params, *arguments)
    np.testing.assert_allclose(y, expected, atol=1e-6 * np.abs(expected).max())
    assert tokens.shape == (2, 2, 64, 16)
    np.testing.assert_allclose(tokens[1], first, atol=1e-6 * np.abs(first).max())
    assert np.abs(tokens[0] - tokens[1]).max() > 0.1 * np.abs(first).max()
    if name == "dit":  # the head takes the tokens of the last block
        s = jax.jit(functools.partial(model.apply, method="trunk"))(params, *arguments)
        np.testing.assert_allclose(tokens[0], s, atol=1e-6 * np.abs(s).max())


@pytest.mark.slow
def test_rematerialised_blocks_keep_less():
    """Count the numbers that a backward pass keeps of the forward pass."""

    def kept(remat):
        model, arguments = _models(remat=remat)["dit"], _arguments("dit")
        params = jax.eval_shape(model.init, jax.random.key(0), *arguments)
        _, residuals = jax.eval_shape(lambda p: jax.vjp(lambda p: model.apply(p, *arguments), p), params)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    assert kept("full") < 0.6 * kept("dots") < 0.6 * 0.8 * kept("none")


@pytest.mark.parametrize("name", ["encoder", "decoder", pytest.param("dit", marks=pytest.mark.slow)])
def test_bfloat16_computes_the_same_to_its_precision(name):
    exact, rough = (_models(dtype=dtype)[name] for dtype in ("float32", "bfloat16"))
    arguments = _arguments(name)
    params = _random_params(exact, arguments)
    a, b = (jax.jit(model.apply)(params, *arguments).astype(jnp.float32) for model in (exact, rough))
    assert 1e-5 < float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)) < 0.03


def test_dense_is_flax_s_and_so_are_its_gradients():
    x = jax.random.normal(jax.random.key(3), (2, 5, 7))
    ours, theirs = Dense(4), nn.Dense(4)
    params = theirs.init(jax.random.key(4), x)

    def outcome(module):
        return jax.value_and_grad(lambda params, x: jnp.sin(module.apply(params, x)).sum(), argnums=(0, 1))(params, x)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), outcome(ours), outcome(theirs))


def test_a_cpu_transposes_for_a_kernel_s_gradient_what_already_lies_in_memory():
    """A loop that computes and transposes takes five to ten times as long as a loop that only transposes."""

    def loss(kernel, x, scale, shift):
        params = {"kernel": kernel, "bias": jnp.zeros(48)}
        return jnp.square(Dense(48).apply({"params": params}, x * scale + shift)).sum()

    x = jnp.ones((2, 16, 64))
    text = jax.jit(jax.grad(loss)).lower(jnp.ones((64, 48)), x, x, x).compile().as_text()
    transposing = [body for body in text.split("\n\n") if re.search(r"= f32\[64,32\]\S* (transpose|copy)\(", body)]
    assert transposing and not any(" multiply(" in body for body in transposing)


def test_magnified_detail_keeps_each_patch_s_mean_colour():
    patches = jax.random.uniform(jax.random.key(5), (2, 3, 4 * 4 * 3))
    magnified = magnify_detail(patches, 4.0).reshape(2, 3, 16, 3)
    before = patches.reshape(2, 3, 16, 3)
    np.testing.assert_allclose(magnified.mean(-2), before.mean(-2), atol=1e-6)
    np.testing.assert_allclose(magnified.std(-2), 4.0 * before.std(-2), rtol=1e-5)


@pytest.mark.parametrize("halves", [False, True])
def test_pairs_of_channels_turn_alike_by_a_product_and_by_slices(halves):
    """Both run on CPU: the product, which a TPU takes, and slices; values and gradients are equal to the last bit."""
    x, weights = jax.random.normal(jax.random.key(0), (2, 2, 5, 3, 12))
    for values in (x, x.astype(jnp.bfloat16)):
        ways = (
            functools.partial(way, halves=halves) for way in (layers._quarter_turn, layers._quarter_turn_by_product)
        )
        slices, product = ((y, *backward(weights)) for y, backward in (jax.vjp(way, values) for way in ways))
        jax.tree.map(np.testing.assert_array_equal, slices, product)
