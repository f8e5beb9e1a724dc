"""Discriminator, its losses and augmentation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rae_jax import augment, losses
from rae_jax.models.discriminator import DiscriminatorHeads, SpectralConv


def test_spectral_convolution_divides_by_the_largest_singular_value():
    conv = SpectralConv(features=6, kernel=9)
    x = jax.random.normal(jax.random.key(0), (2, 16, 4))
    variables = conv.init(jax.random.key(1), x)
    for _ in range(200):
        y, moved = conv.apply(variables, x, mutable=["spectral"])
        variables = {**variables, **moved}
    kernel = np.asarray(variables["params"]["kernel"])
    sigma = np.linalg.svd(kernel.reshape(-1, 6), compute_uv=False)[0]
    padded = np.pad(np.asarray(x), ((0, 0), (4, 4), (0, 0)), mode="wrap")
    windows = np.stack([padded[:, i : i + 16] for i in range(9)], 2)  # [B, N, 9, C]
    expected = np.einsum("bnkc,kcf->bnf", windows, kernel / sigma) + np.asarray(variables["params"]["bias"])
    np.testing.assert_allclose(y, expected, atol=1e-4)


def test_evaluation_leaves_the_singular_vectors_alone():
    heads = DiscriminatorHeads()
    tokens = jax.random.normal(jax.random.key(0), (2, 3, 16, 8))
    variables = heads.init(jax.random.key(1), tokens)
    still, _ = heads.apply(variables, tokens, mutable=())
    logits, moved = heads.apply(variables, tokens, mutable=["spectral"])
    assert logits.shape == (3, 2 * 16)
    np.testing.assert_array_equal(still, heads.apply(variables, tokens))
    for head in ("head0", "head1"):
        for conv in ("in_conv", "mix_conv"):  # the last one has rank one: it is there after one iteration
            before, after = (v["spectral"][head][conv]["u"] for v in (variables, moved))
            assert float(jnp.abs(before - after).max()) > 1e-3


def test_hinge_losses():
    real, fake = jnp.array([2.0, 0.5, -1.0]), jnp.array([-2.0, 0.0, 1.0])
    assert float(losses.hinge_discriminator(real, fake)) == pytest.approx(0.5 * (2.5 / 3 + 3.0 / 3))
    assert float(losses.generator(fake)) == pytest.approx(1.0 / 3)


def test_adaptive_weight_is_clipped_and_constant():
    a, b = jnp.full(4, 3.0), jnp.full(4, 1.0)
    assert float(losses.adaptive_weight(a, b)) == pytest.approx(3.0, rel=1e-5)
    assert float(losses.adaptive_weight(a, jnp.zeros(4))) == 1e4
    assert float(jax.grad(lambda a: losses.adaptive_weight(a, b))(a).sum()) == 0.0


def test_translation_shifts_within_an_eighth():
    x = jax.random.normal(jax.random.key(0), (64, 16, 16, 3))
    y = np.asarray(augment.translate(x, jax.random.key(1)))
    x = np.pad(np.asarray(x), ((0, 0), (2, 2), (2, 2), (0, 0)))
    offsets = set()
    for image, moved in zip(x, y, strict=True):
        hits = [(i, j) for i in range(5) for j in range(5) if np.array_equal(image[i : i + 16, j : j + 16], moved)]
        assert len(hits) == 1
        offsets.add(hits[0])
    assert len(offsets) > 15  # of 25


def test_augmentation_keeps_shapes_and_differs_between_images():
    x = jnp.tile(jax.random.uniform(jax.random.key(0), (1, 16, 16, 3)) * 2 - 1, (4, 1, 1, 1))
    y = augment.diff_augment(x, jax.random.key(1))
    assert y.shape == x.shape
    assert float(jnp.abs(y[0] - y[1]).max()) > 1e-3
