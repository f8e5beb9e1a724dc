"""DiT^DH: a diffusion transformer with a shallow, wide DDT head."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from rae_jax.models import attention, dit
from rae_jax.models.layers import patchify, rope_2d, sincos_2d, torch_linear, unpatchify


class DiTDH(nn.Module):
    """DiT^DH: noisy latents x_t [B, h, w, D], times t [B], conditions -> prediction [B, h, w, D].

    The trunk computes one vector s per token from x_t, t and condition. The head, wide enough for the latent, computes
    the prediction from x_t, t and s. With `layers`, numbers of the trunk's blocks from 0, it also returns the tokens
    after these blocks, [len(layers), B, N, width].
    """

    width: int
    depth: int
    num_heads: int
    head_width: int
    head_depth: int
    head_num_heads: int
    embed: Callable  # width -> module: conditions -> [B, width]; see conditions.Condition
    patch_size: int = 1
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    dtype: jnp.dtype = jnp.float32
    unroll: bool = False
    remat: Callable | None = None  # see layers.scan_blocks
    attend: Callable = attention.xla

    def setup(self):
        self.time_embed = dit.TimeEmbedding(self.width, torch_linear)

    def __call__(self, x, t, condition, layers=()):
        time = self.time_embed(t)
        s, hidden = self._trunk(x, time, condition, bool(layers))
        y = self._head(x, time, s)
        return (y, hidden[jnp.asarray(layers)]) if layers else y

    def trunk(self, x, t, condition):
        """Return s [B, N, width]. It changes slowly with t: the head may also use it at other times."""
        return self._trunk(x, self.time_embed(t), condition, False)[0]

    def head(self, x, t, s):
        """Return the prediction at x_t and t from the trunk's output at the same x_t, or at an earlier one."""
        return self._head(x, self.time_embed(t), s)

    @nn.compact
    def _trunk(self, x, time, condition, hidden):
        grid, tokens = self._tokens(x)
        modulator = nn.silu(time + self.embed(self.width)(condition))[:, None]

        s = dit.patch_embedding(self.width, dtype=self.dtype, name="trunk_embed")(tokens)
        s = s + sincos_2d(*grid, self.width).astype(self.dtype)
        shape = {"depth": self.depth, "num_heads": self.num_heads}
        trunk = dit.blocks(self, **shape, linear=torch_linear, name="trunk", hidden=hidden)
        return trunk(s, modulator, rope_2d(*grid, self.width // self.num_heads))

    @nn.compact
    def _head(self, x, time, s):
        grid, tokens = self._tokens(x)
        s = nn.silu(time[:, None] + s)
        if self.width != self.head_width:
            s = torch_linear(self.head_width, self.width, dtype=self.dtype, name="condition_proj")(s)

        y = dit.patch_embedding(self.head_width, dtype=self.dtype, name="head_embed")(tokens)
        head = dit.blocks(self, depth=self.head_depth, num_heads=self.head_num_heads, linear=torch_linear, name="head")
        y, _ = head(y, s, rope_2d(*grid, self.head_width // self.head_num_heads))
        y = dit.FinalLayer(tokens.shape[-1], self.dtype, name="final_layer")(y, s)
        return unpatchify(y, *grid, self.patch_size).astype(jnp.float32)

    def _tokens(self, x):
        grid = tuple(size // self.patch_size for size in x.shape[1:3])
        return grid, patchify(x.astype(self.dtype), self.patch_size)
