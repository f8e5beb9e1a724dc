"""Objects that the stages get from the config: the losses of the decoder, and the discriminator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny

from rae_jax.build import objectives
from rae_jax.models.lpips import Lpips


def test_the_decoder_s_loss_has_lpips_of_images_in_0_to_1():
    """By hand, where all convolutions but the first two are zero, and those see one pixel alone.

    Images are moved to [-1, 1], normalised by LPIPS' own mean and deviation; features become unit vectors.
    """
    config, rng = tiny(), np.random.default_rng(0)
    assert objectives.decoder_objective(config).perceptual is None  # its weight is 0
    config.decoder.train.lpips_weight = 0.5
    perceptual = objectives.decoder_objective(config).perceptual
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    shapes = jax.eval_shape(Lpips().init, jax.random.key(0), image, image)["params"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    first, second = (params["vgg"][f"conv1_{i}"] for i in (1, 2))
    for layer in (first, second):
        layer["kernel"][1, 1] = rng.normal(size=layer["kernel"].shape[2:])
        layer["bias"][:] = rng.normal(size=layer["bias"].shape)
    weights = params["linear"]["lin0"]["scale"]
    weights[:] = rng.uniform(0.5, 1.5, weights.shape)

    def features(images):
        x = (2 * images - 1 - np.array([-0.030, -0.088, -0.188])) / np.array([0.458, 0.448, 0.450])
        for layer in (first, second):
            x = np.maximum(np.einsum("bhwi,io->bhwo", x, layer["kernel"][1, 1]) + layer["bias"], 0)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    a, b = np.float32(rng.uniform(size=(2, 2, 16, 16, 3)))
    expected = (weights * np.square(features(a) - features(b))).sum(-1).mean((1, 2))
    np.testing.assert_allclose(jax.jit(perceptual)(params, a, b), expected, rtol=1e-4)


@pytest.mark.parametrize("prob, cutout", [(0.0, 0.5), (1.0, 0.5), (1.0, 0.0)])
def test_the_discriminator_augments_as_the_config_says(prob, cutout):
    """With probability 0 not at all; a square of half the side wipes out its quarter at the corners, if not more."""
    config, images = tiny(), np.random.default_rng(0).uniform(-1, 1, (4, 16, 16, 3)).astype(np.float32)
    config.discriminator.augment.update({"prob": prob, "cutout": cutout})
    augmented = np.asarray(
        jax.jit(objectives.decoder_objective(config).discriminator.augment)(images, jax.random.key(0))
    )
    wiped = (augmented == 0).all(-1).sum((1, 2))
    if prob == 0.0:
        np.testing.assert_array_equal(augmented, images)
    elif cutout:
        assert (wiped >= 4 * 4).all() and (wiped <= 8 * 8).all()
    else:
        assert (augmented != images).any((1, 2, 3)).all() and not wiped.any()


@pytest.mark.parametrize("name", ["hinge", "vanilla"])
def test_the_discriminator_minimises_the_config_s_loss(name):
    config, (real, fake) = tiny(), np.random.default_rng(0).normal(scale=2.0, size=(2, 5, 7))
    config.discriminator.loss = name
    expected = {
        "hinge": 0.5 * (np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean()),
        "vanilla": 0.5 * (np.log1p(np.exp(-real)).mean() + np.log1p(np.exp(fake)).mean()),
    }
    discriminator = objectives.decoder_objective(config).discriminator
    found = discriminator.loss(jnp.asarray(real, jnp.float32), jnp.asarray(fake, jnp.float32))
    assert float(found) == pytest.approx(expected[name], rel=1e-5)
    config.decoder.train.adversarial_weight = 0.0
    assert objectives.decoder_objective(config).discriminator is None
