"""DiT^DH: a diffusion transformer with a shallow, wide DDT head."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from rae_jax.models import attention, dit
from rae_jax.models.layers import patchify, rope_2d, sincos_2d, torch_linear, unpatchify


class DiTDH(nn.Module):
    """Velocity of noisy latents x_t [B, h, w, D] at times t [B] for labels [B].

    The trunk turns (x_t, t, label) into a condition per token; the head, wide enough for the latent,
    turns x_t and that condition into the velocity.
    """

    width: int
    depth: int
    num_heads: int
    head_width: int
    head_depth: int
    head_num_heads: int
    num_classes: int
    patch_size: int = 1
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    dtype: jnp.dtype = jnp.float32
    unroll: bool = False
    remat: str = "none"
    attend: Callable = attention.xla

    def setup(self):
        self.time_embed = dit.TimeEmbedding(self.width, torch_linear)

    def __call__(self, x, t, labels):
        time = self.time_embed(t)
        return self._head(x, time, self._trunk(x, time, labels))

    def condition(self, x, t, labels):
        """The condition per token [B, N, width]. It changes slowly with t: the head may use it at other times too."""
        return self._trunk(x, self.time_embed(t), labels)

    def velocity(self, x, t, s):
        """The velocity of x_t at times t, from what the trunk made of the same x_t or of an earlier one."""
        return self._head(x, self.time_embed(t), s)

    @nn.compact
    def _trunk(self, x, time, labels):
        grid, tokens = self._tokens(x)
        label = dit.LabelEmbedding(self.num_classes, self.width, name="label_embed")(labels)
        condition = nn.silu(time + label)[:, None]

        s = dit.patch_embedding(self.width, dtype=self.dtype, name="trunk_embed")(tokens)
        s = s + sincos_2d(*grid, self.width).astype(self.dtype)
        trunk = dit.blocks(self, depth=self.depth, num_heads=self.num_heads, linear=torch_linear, name="trunk")
        return trunk(s, condition, rope_2d(*grid, self.width // self.num_heads))[0]

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
