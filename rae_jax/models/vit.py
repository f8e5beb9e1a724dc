"""Vision transformer encoders (DINOv2's architecture)."""

import jax.numpy as jnp
from flax import linen as nn

from rae_jax.models.layers import Attention, Mlp, dense, patchify, scan_blocks

# Branches start small, so that a patch's pixels reach its token from the first step: in the small pre-training,
# reconstructions after 200 steps were 3 dB better than with branches that start at 1.
LAYER_SCALE_INIT = 0.1


class Block(nn.Module):
    """Pre-norm transformer block whose two branches are scaled per channel (LayerScale)."""

    num_heads: int
    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        def norm(x, name):
            return nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name=name)(x).astype(self.dtype)

        small = nn.initializers.constant(LAYER_SCALE_INIT)

        def scaled(branch, name):
            return branch * self.param(name, small, (x.shape[-1],)).astype(self.dtype)

        branch = Attention(self.num_heads, dtype=self.dtype, name="attention")(norm(x, "norm1"))
        x = x + scaled(branch, "scale1")
        branch = Mlp(self.hidden, dtype=self.dtype, name="mlp")(norm(x, "norm2"))
        x = x + scaled(branch, "scale2")
        return x, x


class ViT(nn.Module):
    """Images [B, H, W, 3], already normalised -> patch tokens after the chosen blocks.

    A class token and registers take part but are not returned. The final norm is left to the caller,
    who needs it without its affine part.
    """

    width: int
    depth: int
    num_heads: int
    mlp_ratio: float
    patch_size: int
    image_size: int
    num_registers: int
    dtype: jnp.dtype = jnp.float32
    unroll: bool = False

    @nn.compact
    def __call__(self, images, layers=None):
        """`layers`: block numbers from 0, the last one by default. Returns [len(layers), B, N, D]."""
        layers = (self.depth - 1,) if layers is None else layers
        batch = images.shape[0]
        small = nn.initializers.normal(0.02)
        num_patches = (self.image_size // self.patch_size) ** 2

        x = patchify(images.astype(self.dtype), self.patch_size)
        x = dense(self.width, dtype=self.dtype, name="patch_embed")(x)
        cls = self.param("cls_token", small, (1, 1, self.width))
        position = self.param("pos_embed", small, (1, 1 + num_patches, self.width))
        registers = self.param("registers", small, (1, self.num_registers, self.width))

        cls = jnp.broadcast_to(cls + position[:, :1], (batch, 1, self.width)).astype(self.dtype)
        x = x + position[:, 1:].astype(self.dtype)
        registers = jnp.broadcast_to(registers, (batch, *registers.shape[1:])).astype(self.dtype)
        x = jnp.concatenate([cls, registers, x], axis=1)

        blocks = scan_blocks(Block, depth=self.depth, unroll=self.unroll, broadcast=0)
        hidden = int(self.mlp_ratio * self.width)
        x, outputs = blocks(self.num_heads, hidden, self.dtype, name="blocks")(x)
        chosen = x[None] if layers == (self.depth - 1,) else outputs[jnp.asarray(layers)]
        return chosen[:, :, 1 + self.num_registers :]
