"""The representation autoencoder, and the VAE that it is compared with, as pure functions of images and latents.

Images are [B, H, W, 3] in [0, 1]; latents are [B, h, w, D] in float32. Modules are arguments: this file does not depend
on a certain encoder or decoder.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rae_jax.models import resize

STATISTICS_EPS = 1e-5


def to_float(images):
    """Convert uint8 pixels to float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255.0


def to_uint8(images):
    """Convert floats in [0, 1] to uint8, clipped and truncated as in the published samples."""
    return (jnp.clip(images, 0.0, 1.0) * 255.0).astype(jnp.uint8)


def normalise_image(images, mean, std):
    """Normalise images in [0, 1] as in the encoder's training: (image - mean) / std per channel."""
    return (images - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def to_latent(tokens, *, eps=1e-6, add_mean=False):
    """Return latent tokens [B, N, D] of raw patch tokens [L, B, N, D]: LayerNorm without affine, mean over the layers.

    `add_mean` adds the last layer's mean over the tokens to every token. Source: the code of arXiv 2605.18324; its
    text says sum, but the code takes the mean.
    """
    tokens = tokens.astype(jnp.float32)
    centred = tokens - tokens.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    latent = normed.mean(0)
    return latent + normed[-1].mean(-2, keepdims=True) if add_mean else latent


def add_noise(latents, key, tau):
    """Augment latents with noise: z + sigma N(0, 1), sigma = tau U[0, 1] per image, before any normalisation."""
    sigma_key, noise_key = jax.random.split(key)
    sigma = tau * jax.random.uniform(sigma_key, (latents.shape[0], 1, 1, 1), jnp.float32)
    return latents + sigma * jax.random.normal(noise_key, latents.shape, jnp.float32)


def normalise(latents, statistics):
    """Return (z - mean) / sqrt(var + 1e-5), with `statistics` {'mean', 'var'}, [h, w, D], or the latents for None."""
    if statistics is None:
        return latents
    return (latents - statistics["mean"]) * jax.lax.rsqrt(statistics["var"] + STATISTICS_EPS)


def denormalise(latents, statistics):
    """Invert `normalise`."""
    if statistics is None:
        return latents
    return latents * jnp.sqrt(statistics["var"] + STATISTICS_EPS) + statistics["mean"]


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """A frozen encoder and a decoder as a pair of pure functions; the parameters are always arguments."""

    encoder: object  # module: normalised images -> raw patch tokens [L, B, N, D]
    decoder: object  # module: latents -> pixels
    mean: tuple  # of the encoder's input, per channel
    std: tuple
    input_size: int | None = None  # images are resized to this size before encoding; None: not resized
    layers: tuple | None = None  # blocks whose tokens make the latent; None: the last block
    add_mean: bool = False  # see to_latent, as norm_eps
    norm_eps: float = 1e-6
    normalised_output: bool = True  # the decoder's pixels are in the encoder's normalisation, not in [0, 1]

    def encode(self, params, images):
        """Encode images [B, H, W, 3] in [0, 1] to latents [B, h, w, D]; `params` are the encoder's."""
        images = self.encoder_input(images)
        tokens = self.encoder.apply({"params": params}, images, self.layers)
        latents = to_latent(tokens, eps=self.norm_eps, add_mean=self.add_mean)
        height, width = (size // self.encoder.patch_size for size in images.shape[1:3])
        return latents.reshape(-1, height, width, latents.shape[-1])

    def encoder_input(self, images):
        """Return the encoder's input for images in [0, 1]: resized to its size (bicubic, not clipped), normalised."""
        return _prepare(images, self.input_size, resize.bicubic, self.mean, self.std)

    def decode(self, params, latents):
        """Decode latents to images around [0, 1], not clipped; `params` are the decoder's."""
        return self.pixels(params, self.features(params, latents))

    def features(self, params, latents):
        """Return the input of the decoder's last linear layer."""
        return self.decoder.apply({"params": params}, latents, method="features")

    def pixels(self, params, features):
        """Return images in [0, 1] from the input of the decoder's last linear layer."""
        pixels = self.decoder.apply({"params": params}, features, method="pixels")
        if not self.normalised_output:
            return pixels
        return pixels * jnp.asarray(self.std, jnp.float32) + jnp.asarray(self.mean, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A frozen vision transformer as a pure function: images -> tokens after some of its blocks."""

    encoder: object  # module: normalised images -> raw patch tokens [L, B, N, D]
    mean: tuple  # of its input, per channel
    std: tuple
    input_size: int
    resize: Callable  # to input_size: resize.bicubic or resize.bilinear
    layers: tuple  # numbers of blocks, from 0, in the order of the result

    def __call__(self, params, images):
        """Return raw patch tokens [L, B, N, D] after the chosen blocks, of images [B, H, W, 3] around [0, 1]."""
        images = _prepare(images, self.input_size, self.resize, self.mean, self.std)
        return self.encoder.apply({"params": params}, images, self.layers)

    @property
    def shape(self):
        """Shape (L, 1, N, D) of the tokens of one image."""
        return len(self.layers), 1, (self.input_size // self.encoder.patch_size) ** 2, self.encoder.width


def _prepare(images, size, resized, mean, std):
    if size is not None and images.shape[1:3] != (size, size):
        images = resized(images, size, size)
    return normalise_image(images, mean, std)


@dataclasses.dataclass(frozen=True)
class SdVae:
    """Stable Diffusion's VAE, with the same encode and decode; it cannot be trained."""

    encoder: object  # module: images in [-1, 1] -> mean and log-variance of the latents
    decoder: object  # module: latents -> images in [-1, 1]
    scale: float = 0.18215  # published with the VAE; gives latents a variance of about one

    def encode(self, params, images):
        """Encode images [B, H, W, 3] in [0, 1] to latents [B, h, w, D]: the scaled mean of the posterior, no sample."""
        moments = self.encoder.apply({"params": params}, self.encoder_input(images))
        return self.scale * jnp.split(moments, 2, -1)[0]

    def encoder_input(self, images):
        """Return the encoder's input, in [-1, 1], for images in [0, 1]."""
        return 2.0 * images - 1.0

    def decode(self, params, latents):
        """Decode latents to images around [0, 1], not clipped; `params` are the decoder's."""
        return (self.decoder.apply({"params": params}, latents / self.scale) + 1.0) / 2.0
