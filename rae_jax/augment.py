"""DiffAug: differentiable augmentations that a discriminator sees (Zhao et al. 2020)."""

import jax
import jax.numpy as jnp

TRANSLATION = 0.125  # of the image's side


def diff_augment(images, key):
    """Colour and translation, one draw per image; images [B, H, W, C] in [-1, 1]."""
    brightness, saturation, contrast, translation = jax.random.split(key, 4)
    images = images + _uniform(brightness, images) - 0.5
    grey = images.mean(-1, keepdims=True)
    images = (images - grey) * (2.0 * _uniform(saturation, images)) + grey
    mean = images.mean((1, 2, 3), keepdims=True)
    images = (images - mean) * (_uniform(contrast, images) + 0.5) + mean
    return translate(images, translation)


def translate(images, key):
    """Shift each image by up to an eighth of its side both ways, zeros moving in."""
    batch, height, width, channels = images.shape
    reach = (int(height * TRANSLATION + 0.5), int(width * TRANSLATION + 0.5))
    high = jnp.asarray(reach) * 2 + 1
    offsets = jax.random.randint(key, (batch, 2), 0, high)
    padded = jnp.pad(images, ((0, 0), (reach[0], reach[0]), (reach[1], reach[1]), (0, 0)))

    def crop(image, offset):
        return jax.lax.dynamic_slice(image, (*offset, 0), (height, width, channels))

    return jax.vmap(crop)(padded, offsets)


def _uniform(key, images):
    return jax.random.uniform(key, (images.shape[0], 1, 1, 1))
