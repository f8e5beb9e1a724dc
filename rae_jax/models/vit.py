"""Vision transformers: the small encoder, DINO, DINOv2, SigLIP2, MAE and DINOv3 are one module with other fields."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from rae_jax.models import attention, resize
from rae_jax.models.dense import Dense
from rae_jax.models.layers import Attention, patchify, rope_centred, scan_blocks

# Small initial branches let the pixels of a patch reach its token from the first step: in the small pre-training,
# reconstructions after 200 steps were 3 dB better than with branches of scale 1.
LAYER_SCALE_INIT = 0.1
_SMALL = nn.initializers.normal(0.02)


class Block(nn.Module):
    """Pre-norm transformer block whose two branches may be scaled per channel (LayerScale)."""

    num_heads: int
    mlp: Callable
    layer_scale: bool
    norm_eps: float
    dtype: jnp.dtype
    attend: Callable

    @nn.compact
    def __call__(self, x, rope):
        def norm(x, name):
            return nn.LayerNorm(epsilon=self.norm_eps, dtype=jnp.float32, name=name)(x).astype(self.dtype)

        def scaled(branch, name):
            if not self.layer_scale:
                return branch
            small = nn.initializers.constant(LAYER_SCALE_INIT)
            return branch * self.param(name, small, (x.shape[-1],), jnp.float32).astype(self.dtype)

        options = {"dtype": self.dtype, "rotate_halves": True, "attend": self.attend}
        branch = Attention(self.num_heads, **options, name="attention")(norm(x, "norm1"), rope)
        x = x + scaled(branch, "scale1")
        branch = self.mlp(dtype=self.dtype, name="mlp")(norm(x, "norm2"))
        x = x + scaled(branch, "scale2")
        return x, x


class ViT(nn.Module):
    """Normalised images [B, H, W, 3], H and W multiples of the patch size -> patch tokens after the chosen blocks.

    A class token and registers are used but not returned. The final norm is left to callers, which need it without its
    affine part. Positions are a table for images of `position_size`, resized (bicubic) for other sizes; with `rope`
    they are rotations of queries and keys instead.
    """

    width: int
    depth: int
    num_heads: int
    mlp: Callable  # dtype, name -> module
    patch_size: int
    position_size: int
    num_registers: int
    cls_token: bool = True
    layer_scale: bool = True
    rope: bool = False
    antialias: bool = False  # when the table of positions is resized
    norm_eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    unroll: bool = False
    remat: Callable | None = None  # see layers.scan_blocks
    attend: Callable = attention.xla

    @nn.compact
    def __call__(self, images, layers=None):
        """Return tokens [len(layers), B, N, D]. `layers`: numbers of blocks from 0; default: the last block."""
        layers = (self.depth - 1,) if layers is None else layers
        grid = (images.shape[1] // self.patch_size, images.shape[2] // self.patch_size)
        x = patchify(images.astype(self.dtype), self.patch_size)
        x = Dense(self.width, dtype=self.dtype, name="patch_embed")(x)
        x, num_prefix = self._with_positions(x, grid)
        rope = None
        if self.rope:
            rope = rope_centred(*grid, self.width // self.num_heads)
            rope = jnp.pad(rope, ((num_prefix, 0), (0, 0)))  # class token and registers are not rotated

        blocks = scan_blocks(Block, depth=self.depth, unroll=self.unroll, remat=self.remat, broadcast=1)
        options = (self.num_heads, self.mlp, self.layer_scale, self.norm_eps, self.dtype, self.attend)
        blocks = blocks(*options, name="blocks")
        x, outputs = blocks(x, rope)
        chosen = x[None] if layers == (self.depth - 1,) else outputs[jnp.asarray(layers)]
        return chosen[:, :, num_prefix:]

    def _with_positions(self, x, grid):
        """Return tokens with positions, with class token and registers in front, and the number of tokens in front."""
        prefix = []
        if self.cls_token:
            prefix.append(self.param("cls_token", _SMALL, (1, 1, self.width), jnp.float32))
        if not self.rope:
            side = self.position_size // self.patch_size
            table = self.param("pos_embed", _SMALL, (1, self.cls_token + side**2, self.width), jnp.float32)
            prefix = [token + table[:, :1] for token in prefix]
            patches = table[:, self.cls_token :]
            if grid != (side, side):
                patches = patches.reshape(1, side, side, self.width)
                patches = resize.bicubic(patches, *grid, antialias=self.antialias).reshape(1, -1, self.width)
            x = x + patches.astype(self.dtype)
        if self.num_registers:
            prefix.append(self.param("registers", _SMALL, (1, self.num_registers, self.width), jnp.float32))
        batch = x.shape[0]
        prefix = [jnp.broadcast_to(p, (batch, *p.shape[1:])).astype(self.dtype) for p in prefix]
        return jnp.concatenate([*prefix, x], axis=1), sum(p.shape[1] for p in prefix)
