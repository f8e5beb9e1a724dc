"""Diffusion transformers with a shallow, wide DDT head: DiT^DH, and RAEv2's, which is conditioned in context."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from rae_jax.models import attention, dit
from rae_jax.models.layers import patchify, rope_2d, sincos_2d, torch_linear, unpatchify


class DiTDH(nn.Module):
    """DiT^DH: noisy latents x_t [B, h, w, D], times t [B], conditions -> prediction [B, h, w, D].

    The trunk computes one vector s per token from x_t, t and condition. The head, wide enough for the latent, computes
    the prediction from x_t, t and s. With `base_depth` a linear layer makes a second prediction, the base output, from
    the trunk's tokens after this number of blocks. With `base`, a call returns (prediction, base output). With
    `layers`, numbers of the trunk's blocks from 0, it also returns the tokens after these blocks,
    [len(layers), B, N, width]. With `mean_velocity` it takes a second time r: see dit.DiT.
    """

    width: int
    depth: int
    num_heads: int
    head_width: int
    head_depth: int
    head_num_heads: int
    embed: Callable  # width -> module: conditions -> [B, width]; see conditions.Condition
    base_depth: int = 0
    patch_size: int = 1
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    mean_velocity: bool = False
    dtype: jnp.dtype = jnp.float32
    unroll: bool = False
    remat: Callable | None = None  # see layers.scan_blocks
    attend: Callable = attention.xla

    def setup(self):
        self.time_embed = dit.TimeEmbedding(self.width, torch_linear)
        if self.mean_velocity:
            self.interval_embed = dit.TimeEmbedding(self.width, torch_linear)

    def __call__(self, x, t, condition, layers=(), base=False, r=None):
        time = self._time(t, r)
        s, base_output, hidden = self._trunk(x, time, condition, bool(layers))
        y = self._head(x, time, s)
        y = (y, base_output) if base else y
        return (y, hidden[jnp.asarray(layers)]) if layers else y

    def trunk(self, x, t, condition):
        """Return s [B, N, width]. It changes slowly with t: the head may also use it at other times."""
        return self._trunk(x, self._time(t), condition, False)[0]

    def trunk_and_base(self, x, t, condition):
        """Return (s [B, N, width], base output [B, h, w, D])."""
        return self._trunk(x, self._time(t), condition, False)[:2]

    def head(self, x, t, s):
        """Return the prediction at x_t and t from the trunk's output at the same x_t, or at an earlier one."""
        return self._head(x, self._time(t), s)

    def _time(self, t, r=None):
        time = self.time_embed(t)
        return time + self.interval_embed(dit.interval(t, r)) if self.mean_velocity else time

    @nn.compact
    def _trunk(self, x, time, condition, hidden):
        """Return (s, base output or None, the tokens after all blocks or None)."""
        grid, tokens = self._tokens(x)
        y, modulator, rope = self._inputs(tokens, grid, time, condition)
        depths = {"base": self.base_depth, "trunk": self.depth - self.base_depth}
        base, after = None, []
        for name, depth in depths.items():
            if depth:
                options = {"num_heads": self.num_heads, "linear": torch_linear, "hidden": hidden}
                y, found = dit.blocks(self, depth=depth, name=name, **options)(y, modulator, rope)
                after.append(found)
            if name == "base" and depth:
                base = self._base_output(y[:, : tokens.shape[1]], time, tokens.shape[-1], grid)
        hidden = jnp.concatenate(after)[:, :, : tokens.shape[1]] if hidden else None
        return y[:, : tokens.shape[1]], base, hidden

    def _inputs(self, tokens, grid, time, condition):
        """Return (the trunk's first tokens, modulator, angles of rotation), for the blocks of module dit."""
        modulator = nn.silu(time + self.embed(self.width)(condition))[:, None]
        y = dit.patch_embedding(self.width, dtype=self.dtype, name="trunk_embed")(tokens)
        y = y + sincos_2d(*grid, self.width).astype(self.dtype)
        return y, modulator, rope_2d(*grid, self.width // self.num_heads)

    def _base_output(self, y, time, features, grid):
        y = nn.silu(time[:, None] + y)
        y = dit.FinalLayer(features, self.dtype, name="base_final_layer")(y, y)
        return unpatchify(y, *grid, self.patch_size).astype(jnp.float32)

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


class InContextDiTDH(DiTDH):
    """RAEv2's diffusion transformer (arXiv 2605.18324): DiT^DH whose trunk reads time and condition as tokens.

    The trunk's blocks have neither adaLN nor gates, and image tokens get no position but the rotation. `embed`:
    width -> module: conditions -> tokens [B, T, width].
    """

    time_tokens: int = 4

    def _inputs(self, tokens, grid, time, condition):
        y = dit.patch_embedding(self.width, dtype=self.dtype, name="trunk_embed")(tokens)
        learned = nn.initializers.normal(self.width**-0.5)
        learned = self.param("time_tokens", learned, (self.time_tokens, self.width), jnp.float32)
        context = jnp.concatenate([time[:, None] + learned, self.embed(self.width)(condition)], 1)
        y = jnp.concatenate([y, context.astype(self.dtype)], 1)
        rope = rope_2d(*grid, self.width // self.num_heads)
        return y, None, jnp.pad(rope, ((0, context.shape[1]), (0, 0)))  # time and condition are not rotated
