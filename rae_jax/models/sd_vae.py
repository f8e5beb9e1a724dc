"""The convolutional autoencoder of Stable Diffusion (AutoencoderKL in diffusers), encoder and decoder.

Residual blocks at several levels; each level has half the resolution of the level before. The coarsest level has
self-attention over all positions.
"""

import jax.numpy as jnp
from flax import linen as nn

from rae_jax.models.layers import Attention

_GROUPS = 32


class ResBlock(nn.Module):
    """Two convolutions, each after norm and SiLU, added to their input."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        y = _conv(self, self.width, "conv1")(nn.silu(_norm(self, "norm1")(x)))
        y = _conv(self, self.width, "conv2")(nn.silu(_norm(self, "norm2")(y)))
        if x.shape[-1] != self.width:
            x = _conv(self, self.width, "shortcut", size=1)(x)
        return x + y


class Middle(nn.Module):
    """Residual block, residual self-attention with one head, residual block."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        x = ResBlock(channels, self.dtype, name="block0")(x)
        tokens = _norm(self, "norm")(x).astype(self.dtype).reshape(batch, height * width, channels)
        x = x + Attention(1, dtype=self.dtype, name="attention")(tokens).reshape(x.shape)
        return ResBlock(channels, self.dtype, name="block1")(x)


class Encoder(nn.Module):
    """Images [B, H, W, 3] in [-1, 1] -> mean and log-variance of the latents, [B, h, w, 2 * latent_width], float32.

    H and W are multiples of 2^(levels - 1); h and w are smaller by this factor.
    """

    widths: tuple  # of the levels, the finest level first
    depth: int  # residual blocks in each level
    latent_width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images):
        x = _conv(self, self.widths[0], "conv_in")(images)
        for level, width in enumerate(self.widths):
            for block in range(self.depth):
                x = ResBlock(width, self.dtype, name=f"level{level}_block{block}")(x)
            if level < len(self.widths) - 1:
                x = _conv(self, width, f"level{level}_resample", strides=2)(x)
        x = Middle(self.dtype, name="middle")(x)
        x = _conv(self, 2 * self.latent_width, "conv_out")(nn.silu(_norm(self, "norm_out")(x)))
        return _conv(self, 2 * self.latent_width, "quant", size=1)(x).astype(jnp.float32)


class Decoder(nn.Module):
    """Latents [B, h, w, D] -> images [B, H, W, 3] around [-1, 1], float32; depth + 1 blocks in each level."""

    widths: tuple  # as the encoder's
    depth: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, latents):
        x = _conv(self, latents.shape[-1], "post_quant", size=1)(latents)
        x = _conv(self, self.widths[-1], "conv_in")(x)
        x = Middle(self.dtype, name="middle")(x)
        for level, width in enumerate(reversed(self.widths)):
            for block in range(self.depth + 1):
                x = ResBlock(width, self.dtype, name=f"level{level}_block{block}")(x)
            if level < len(self.widths) - 1:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = _conv(self, width, f"level{level}_resample")(x)
        return _conv(self, 3, "conv_out")(nn.silu(_norm(self, "norm_out")(x))).astype(jnp.float32)


def _conv(module, features, name, *, size=3, **options):
    # 'SAME': a strided convolution of an even size is padded only at the bottom and right edges, as in this network.
    return nn.Conv(features, (size, size), padding="SAME", dtype=module.dtype, name=name, **options)


def _norm(module, name):
    # Variance from differences: channels of this network may be far from zero, and E[x^2] - E[x]^2 would cancel.
    return nn.GroupNorm(_GROUPS, epsilon=1e-6, dtype=jnp.float32, use_fast_variance=False, name=name)
