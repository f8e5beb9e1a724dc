"""The plain diffusion transformer, and its parts: embeddings of time and label, adaLN blocks, final layer.

Conditions are [B, 1, C] (one for all tokens) or [B, N, C] (one a token).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from rae_jax.models import attention
from rae_jax.models.dense import Dense
from rae_jax.models.layers import (
    Attention,
    SwiGlu,
    patchify,
    rms_norm,
    rope_2d,
    scan_blocks,
    sincos_2d,
    unpatchify,
    xavier_linear,
)
from rae_jax.runtime import sharding

NUM_FREQUENCIES = 256
_SMALL = nn.initializers.normal(0.02)
_ZEROS = nn.initializers.zeros


class TimeEmbedding(nn.Module):
    """Times [B] -> [B, width]: fixed random Fourier features, then an MLP, all in float32, products in earnest."""

    width: int
    linear: Callable  # how the biases start

    @nn.compact
    def __call__(self, t):
        # A stored constant: it lives with the parameters, and no gradient ever reaches it.
        frequencies = self.param("frequencies", nn.initializers.normal(1.0), (NUM_FREQUENCIES,))
        angles = 2.0 * jnp.pi * t[:, None] * jax.lax.stop_gradient(frequencies)
        x = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)

        def layer(x, name):
            return self.linear(self.width, x.shape[-1], dtype=jnp.float32, name=name, kernel_init=_SMALL)(x)

        with jax.default_matmul_precision("highest"):  # a TPU would round float32 to bfloat16
            return layer(nn.silu(layer(x, "fc1")), "fc2")


def in_dtype(params, dtype):
    """A DiT's parameters with the kernels in the dtype of their products, as each evaluation would cast them anew."""

    def cast(path, leaf):
        *modules, name = (key.key for key in path)
        return leaf.astype(dtype) if name == "kernel" and "time_embed" not in modules else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


class LabelEmbedding(nn.Module):
    """Labels [B] -> [B, width]; the row after the last class stands for no label. Without classes, all mean that."""

    num_classes: int
    width: int

    @nn.compact
    def __call__(self, labels):
        table = self.param("table", _SMALL, (self.num_classes + 1, self.width))
        table = sharding.gathered(table, "table")
        return table[labels if self.num_classes else jnp.zeros_like(labels)]


class Modulation(nn.Module):
    """SiLU, then a linear layer that starts at zero: `count` tensors of x's width from a condition."""

    count: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, condition):
        condition = nn.silu(condition).astype(self.dtype)
        zeros = {"kernel_init": _ZEROS, "bias_init": _ZEROS}
        return Dense(self.count * self.width, dtype=self.dtype, parts=self.count, name="linear", **zeros)(condition)


class Block(nn.Module):
    """Attention and SwiGLU, each between an adaLN shift/scale and a gate."""

    num_heads: int
    mlp_ratio: float
    qk_norm: bool
    linear: Callable
    dtype: jnp.dtype
    attend: Callable

    @nn.compact
    def __call__(self, x, condition, rope):
        modulation = Modulation(6, x.shape[-1], self.dtype, name="modulation")(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        y = modulate(rms_norm("norm1")(x), shift1, scale1).astype(self.dtype)
        options = {"dtype": self.dtype, "linear": self.linear, "attend": self.attend}
        x = x + gate1 * Attention(self.num_heads, self.qk_norm, **options, name="attention")(y, rope)
        y = modulate(rms_norm("norm2")(x), shift2, scale2).astype(self.dtype)
        hidden = int(2 / 3 * self.mlp_ratio * x.shape[-1])
        x = x + gate2 * SwiGlu(hidden, self.dtype, self.linear, name="mlp")(y)
        return x, None


class FinalLayer(nn.Module):
    """RMSNorm, shift/scale from the condition, and a linear layer that starts at zero."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, condition):
        shift, scale = Modulation(2, x.shape[-1], self.dtype, name="modulation")(condition)
        x = modulate(rms_norm("norm")(x), shift, scale).astype(self.dtype)
        return Dense(self.features, dtype=self.dtype, kernel_init=_ZEROS, bias_init=_ZEROS, name="linear")(x)


def patch_embedding(width, *, dtype, name):
    """Linear embedding of patches of the latent."""
    return Dense(width, dtype=dtype, kernel_init=nn.initializers.xavier_uniform(), name=name)


def modulate(x, shift, scale):
    """x (1 + scale) + shift."""
    return x * (1.0 + scale) + shift


def blocks(module, *, depth, num_heads, linear, name):
    """`depth` blocks of a diffusion transformer, scanned, with what they share taken from the module's fields."""
    scanned = scan_blocks(Block, depth=depth, unroll=module.unroll, remat=module.remat, broadcast=2)
    return scanned(num_heads, module.mlp_ratio, module.qk_norm, linear, module.dtype, module.attend, name=name)


class DiT(nn.Module):
    """Velocity of noisy latents x_t [B, h, w, D] at times t [B] for labels [B], by a plain transformer."""

    width: int
    depth: int
    num_heads: int
    num_classes: int
    patch_size: int = 1
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    dtype: jnp.dtype = jnp.float32
    unroll: bool = False
    remat: str = "none"
    attend: Callable = attention.xla

    @nn.compact
    def __call__(self, x, t, labels):
        grid = tuple(size // self.patch_size for size in x.shape[1:3])
        condition = TimeEmbedding(self.width, xavier_linear, name="time_embed")(t)
        condition = (condition + LabelEmbedding(self.num_classes, self.width, name="label_embed")(labels))[:, None]

        tokens = patchify(x.astype(self.dtype), self.patch_size)
        y = patch_embedding(self.width, dtype=self.dtype, name="embed")(tokens)
        y = y + sincos_2d(*grid, self.width).astype(self.dtype)
        trunk = blocks(self, depth=self.depth, num_heads=self.num_heads, linear=xavier_linear, name="blocks")
        y, _ = trunk(y, condition, rope_2d(*grid, self.width // self.num_heads))
        y = FinalLayer(tokens.shape[-1], self.dtype, name="final_layer")(y, condition)
        return unpatchify(y, *grid, self.patch_size).astype(jnp.float32)
