"""ViT decoder: latents to pixels (the decoder of MAE without its mask tokens)."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from rae_jax.models import attention, resize
from rae_jax.models.dense import Dense
from rae_jax.models.layers import Attention, Mlp, scan_blocks, sincos_2d, unpatchify

_INIT = nn.initializers.normal(0.02)


class Block(nn.Module):
    """Pre-norm transformer block."""

    num_heads: int
    hidden: int
    dtype: jnp.dtype
    attend: Callable

    @nn.compact
    def __call__(self, x):
        def norm(x, name):
            return nn.LayerNorm(epsilon=1e-12, dtype=jnp.float32, name=name)(x).astype(self.dtype)

        x = x + Attention(self.num_heads, dtype=self.dtype, attend=self.attend, name="attention")(norm(x, "norm1"))
        x = x + Mlp(self.hidden, dtype=self.dtype, name="mlp")(norm(x, "norm2"))
        return x, None


class Decoder(nn.Module):
    """Latents [B, h, w, D] -> features and pixels, whose normalisation is the autoencoder's matter.

    With `grid_size` the decoder works on grid_size x grid_size tokens, and latents of another size are resized.
    """

    width: int
    depth: int
    num_heads: int
    hidden: int
    patch_size: int
    grid_size: int | None = None
    dtype: jnp.dtype = jnp.float32
    unroll: bool = False
    remat: Callable | None = None  # see layers.scan_blocks
    attend: Callable = attention.xla

    def setup(self):
        self.embed = Dense(self.width, dtype=self.dtype, kernel_init=_INIT)
        self.cls_token = self.param("cls_token", _INIT, (1, 1, self.width), jnp.float32)
        blocks = scan_blocks(Block, depth=self.depth, unroll=self.unroll, remat=self.remat, broadcast=0)
        self.blocks = blocks(self.num_heads, self.hidden, self.dtype, self.attend)
        self.norm = nn.LayerNorm(epsilon=1e-12, dtype=jnp.float32)
        self.pred = Dense(self.patch_size**2 * 3, dtype=self.dtype, kernel_init=_INIT)

    def __call__(self, latents):
        """Return pixels [B, h * p, w * p, 3]."""
        return self.pixels(self.features(latents))

    def features(self, latents):
        """Return the input of the last linear layer, [B, h, w, width]."""
        if self.grid_size:
            latents = resize.bilinear(latents, self.grid_size, self.grid_size)
        batch, height, width, _ = latents.shape
        x = self.embed(latents.reshape(batch, height * width, -1).astype(self.dtype))
        x = x + sincos_2d(height, width, self.width).astype(self.dtype)
        cls = jnp.broadcast_to(self.cls_token, (batch, 1, self.width)).astype(self.dtype)
        x, _ = self.blocks(jnp.concatenate([cls, x], axis=1))
        return self.norm(x)[:, 1:].astype(self.dtype).reshape(batch, height, width, self.width)

    def pixels(self, features):
        """Apply the last linear layer and return pixels, with the patch of each token in its place."""
        batch, height, width, _ = features.shape
        patches = self.pred(features).astype(jnp.float32).reshape(batch, height * width, -1)
        return unpatchify(patches, height, width, self.patch_size)
