"""The adversarial loss of the decoder: losses of logits, its adaptive weight, and augmentations of images.

The augmentations are DiffAug's (Zhao et al. 2020), in the order of StyleGAN-T.
"""

import jax
import jax.numpy as jnp

TRANSLATION = 0.125  # largest shift, as a fraction of the image's side


def hinge_loss(real, fake):
    """Return 0.5 (relu(1 - real) + relu(1 + fake)), averaged over logits."""
    return 0.5 * (jax.nn.relu(1.0 - real).mean() + jax.nn.relu(1.0 + fake).mean())


def vanilla_loss(real, fake):
    """Return 0.5 (softplus(-real) + softplus(fake)), averaged over logits: the original GAN's cross-entropy."""
    return 0.5 * (jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean())


def generator_loss(fake):
    """Return -mean(fake), for every loss of the discriminator."""
    return -fake.mean()


def adaptive_weight(reconstruction_gradient, adversarial_gradient, *, maximum=1e4):
    """Return the ratio of two gradients' norms at the decoder's last weight (VQGAN), with no gradient of its own."""
    ratio = _norm(reconstruction_gradient) / (_norm(adversarial_gradient) + 1e-6)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, maximum))


def _norm(x):
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32))))


def diff_augment(images, key, *, prob=1.0, cutout=0.0):
    """Apply translation, colour and cutout to images [B, H, W, C] in [-1, 1]; colour may leave this range.

    All draws are independent for each image. Each of the three is applied with probability `prob`. `cutout` is the side
    of the square that is set to zero, as a fraction of the image's side.
    """
    *draws, translation = jax.random.split(key, 4)

    def with_probability(i, changed, images):
        if prob >= 1.0:
            return changed
        chosen = jax.random.bernoulli(jax.random.fold_in(key, i), jnp.float32(prob), (images.shape[0], 1, 1, 1))
        return jnp.where(chosen, changed, images)

    images = with_probability(0, translate(images, translation), images)
    images = with_probability(1, colour(images, draws), images)
    if cutout:
        images = with_probability(2, cut_out(images, jax.random.fold_in(key, 3), cutout), images)
    return images


def translate(images, key):
    """Shift each image by up to an eighth of its side in both directions; the free border is zero."""
    batch, height, width, channels = images.shape
    reach = (int(height * TRANSLATION + 0.5), int(width * TRANSLATION + 0.5))
    high = jnp.asarray(reach, jnp.int32) * 2 + 1
    offsets = jax.random.randint(key, (batch, 2), 0, high, jnp.int32)
    padded = jnp.pad(images, ((0, 0), (reach[0], reach[0]), (reach[1], reach[1]), (0, 0)))

    def crop(image, offset):
        return jax.lax.dynamic_slice(image, (*offset, jnp.int32(0)), (height, width, channels))

    return jax.vmap(crop)(padded, offsets)


def colour(images, keys):
    """Change brightness by up to +-0.5, saturation by a factor of 0 to 2, contrast by a factor of 0.5 to 1.5."""
    brightness, saturation, contrast = (
        jax.random.uniform(key, (images.shape[0], 1, 1, 1), jnp.float32) for key in keys
    )
    images = images + brightness - 0.5
    grey = images.mean(-1, keepdims=True)
    images = (images - grey) * (2.0 * saturation) + grey
    mean = images.mean((1, 2, 3), keepdims=True)
    return (images - mean) * (contrast + 0.5) + mean


def cut_out(images, key, ratio):
    """Set a square of `ratio` times the image's sides to zero; its centre is anywhere in the image."""
    height, width = images.shape[1:3]
    inside = []
    for axis, (size, draw) in enumerate(zip((height, width), jax.random.split(key), strict=True), start=1):
        side = round(size * ratio)
        first = jax.random.randint(draw, (images.shape[0],), 0, size + 1 - side % 2, jnp.int32) - side // 2
        place = jnp.arange(size) - first[:, None]
        inside.append(jnp.expand_dims((place >= 0) & (place < side), (3 - axis, 3)))
    return jnp.where(inside[0] & inside[1], 0.0, images)
