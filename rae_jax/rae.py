"""The representation autoencoder as pure functions of images and latents.

Images are [B, H, W, 3] in [0, 1]; latents are [B, h, w, D] in float32. Modules come in from outside,
so that nothing here knows which encoder or decoder is meant.
"""

import dataclasses

import jax
import jax.numpy as jnp

STATISTICS_EPS = 1e-5


def to_float(images):
    """uint8 pixels -> float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255.0


def to_uint8(images):
    """Floats in [0, 1] -> uint8, clipped and truncated as the published samples were."""
    return (jnp.clip(images, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def normalise_image(images, mean, std):
    """[0, 1] -> what the encoder was trained on: (image - mean) / std per channel."""
    return (images - jnp.asarray(mean)) / jnp.asarray(std)


def to_latent(tokens):
    """Raw patch tokens [B, N, D] of a square grid -> latents: LayerNorm without affine, on the grid."""
    tokens = tokens.astype(jnp.float32)
    centred = tokens - tokens.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)
    side = int(tokens.shape[1] ** 0.5)
    return normed.reshape(tokens.shape[0], side, side, tokens.shape[2])


def add_noise(latents, key, tau):
    """Noise augmentation: sigma = tau U[0, 1] per image, z + sigma N(0, 1), before any normalisation."""
    sigma_key, noise_key = jax.random.split(key)
    sigma = tau * jax.random.uniform(sigma_key, (latents.shape[0], 1, 1, 1))
    return latents + sigma * jax.random.normal(noise_key, latents.shape)


def normalise(latents, statistics):
    """(z - mean) / sqrt(var + 1e-5) per element; statistics hold 'mean' and 'var', [h, w, D]."""
    return (latents - statistics["mean"]) * jax.lax.rsqrt(statistics["var"] + STATISTICS_EPS)


def denormalise(latents, statistics):
    """`normalise` undone."""
    return latents * jnp.sqrt(statistics["var"] + STATISTICS_EPS) + statistics["mean"]


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """A frozen encoder and a decoder as a pair of pure functions; the parameters are always arguments."""

    encoder: object  # module: normalised images -> raw patch tokens [L, B, N, D]
    decoder: object  # module: latents -> pixels in the encoder's normalisation
    mean: tuple  # of the encoder's input, per channel
    std: tuple

    def encode(self, params, images):
        """Images [B, H, W, 3] in [0, 1] -> latents [B, h, w, D]; `params` are the encoder's."""
        return to_latent(self.tokens(params, images)[-1])

    def tokens(self, params, images, layers=None):
        """Raw patch tokens [L, B, N, D] after the chosen encoder blocks (the last by default)."""
        return self.encoder.apply({"params": params}, normalise_image(images, self.mean, self.std), layers)

    def decode(self, params, latents):
        """Latents -> images around [0, 1], not clipped; `params` are the decoder's."""
        return self.pixels(params, self.features(params, latents), latents.shape[1:3])

    def features(self, params, latents):
        """What the decoder's last linear layer sees."""
        return self.decoder.apply({"params": params}, latents, method="features")

    def pixels(self, params, features, grid):
        """The decoder's last linear layer, back in [0, 1]."""
        pixels = self.decoder.apply({"params": params}, features, grid, method="pixels")
        return pixels * jnp.asarray(self.std) + jnp.asarray(self.mean)
