"""The plain diffusion transformer, and its parts: time embedding, adaLN blocks, final layer.

A block's `modulator` is [B, 1, C], the same for all tokens, or [B, N, C]. `condition`: see conditions.Condition.
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

NUM_FREQUENCIES = 256
_SMALL = nn.initializers.normal(0.02)
_ZEROS = nn.initializers.zeros


class TimeEmbedding(nn.Module):
    """Times [B] -> [B, width]: fixed random Fourier features, then an MLP, all in full float32."""

    width: int
    linear: Callable  # layers.torch_linear or layers.xavier_linear: the initial biases

    @nn.compact
    def __call__(self, t):
        # A constant that is stored with the parameters and gets no gradient.
        frequencies = self.param("frequencies", nn.initializers.normal(1.0), (NUM_FREQUENCIES,), jnp.float32)
        angles = 2.0 * jnp.pi * t[:, None] * jax.lax.stop_gradient(frequencies)
        x = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)

        def layer(x, name):
            return self.linear(self.width, x.shape[-1], dtype=jnp.float32, name=name, kernel_init=_SMALL)(x)

        with jax.default_matmul_precision("highest"):  # a TPU would round float32 to bfloat16
            return layer(nn.silu(layer(x, "fc1")), "fc2")


def in_dtype(params, dtype):
    """Cast the kernels of a DiT's parameters to the dtype of their products, once for a whole trajectory."""

    def cast(path, leaf):
        *modules, name = (key.key for key in path)
        of_times = {"time_embed", "interval_embed"} & set(modules)
        return leaf.astype(dtype) if name == "kernel" and not of_times else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


class Modulation(nn.Module):
    """SiLU, then a linear layer that starts at zero: `count` tensors [B, 1 or N, width] from a modulator."""

    count: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, modulator):
        modulator = nn.silu(modulator).astype(self.dtype)
        zeros = {"kernel_init": _ZEROS, "bias_init": _ZEROS}
        return Dense(self.count * self.width, dtype=self.dtype, parts=self.count, name="linear", **zeros)(modulator)


class Block(nn.Module):
    """Attention and SwiGLU, each between an adaLN shift/scale and a gate; with `hidden`, the tokens as an output.

    Without a modulator (None) there is neither adaLN nor gate.
    """

    num_heads: int
    mlp_ratio: float
    qk_norm: bool
    linear: Callable
    dtype: jnp.dtype
    attend: Callable
    hidden: bool = False

    @nn.compact
    def __call__(self, x, modulator, rope):
        options = {"dtype": self.dtype, "linear": self.linear, "attend": self.attend}
        attend = Attention(self.num_heads, self.qk_norm, **options, name="attention")
        mlp = SwiGlu(int(2 / 3 * self.mlp_ratio * x.shape[-1]), self.dtype, self.linear, name="mlp")
        if modulator is None:
            x = x + attend(rms_norm("norm1")(x).astype(self.dtype), rope)
            x = x + mlp(rms_norm("norm2")(x).astype(self.dtype))
            return x, x if self.hidden else None
        modulation = Modulation(6, x.shape[-1], self.dtype, name="modulation")(modulator)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        y = modulate(rms_norm("norm1")(x), shift1, scale1).astype(self.dtype)
        x = x + gate1 * attend(y, rope)
        y = modulate(rms_norm("norm2")(x), shift2, scale2).astype(self.dtype)
        x = x + gate2 * mlp(y)
        return x, x if self.hidden else None


class FinalLayer(nn.Module):
    """RMSNorm, shift/scale from the modulator, and a linear layer that starts at zero."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, modulator):
        shift, scale = Modulation(2, x.shape[-1], self.dtype, name="modulation")(modulator)
        x = modulate(rms_norm("norm")(x), shift, scale).astype(self.dtype)
        return Dense(self.features, dtype=self.dtype, kernel_init=_ZEROS, bias_init=_ZEROS, name="linear")(x)


def interval(t, r):
    """Return t - r [B], the interval of a mean velocity; without an r it is empty, for the velocity at t."""
    return jnp.zeros_like(t) if r is None else t - r


def patch_embedding(width, *, dtype, name):
    """Return the linear embedding of the patches of latents."""
    return Dense(width, dtype=dtype, kernel_init=nn.initializers.xavier_uniform(), name=name)


def modulate(x, shift, scale):
    """Return x (1 + scale) + shift."""
    return x * (1.0 + scale) + shift


def blocks(module, *, depth, num_heads, linear, name, hidden=False):
    """Return `depth` scanned blocks of a diffusion transformer; the fields that they share are the module's.

    They map (x, modulator, rope) to (x, the tokens after each block [depth, B, N, D], or None without `hidden`).
    """
    scanned = scan_blocks(Block, depth=depth, unroll=module.unroll, remat=module.remat, broadcast=2)
    fields = (num_heads, module.mlp_ratio, module.qk_norm, linear, module.dtype, module.attend, hidden)
    return scanned(*fields, name=name)


class DiT(nn.Module):
    """Plain diffusion transformer: noisy latents x_t [B, h, w, D], times t [B], conditions -> prediction [B, h, w, D].

    With `layers`, numbers of blocks from 0, it also returns the tokens after these blocks, [len(layers), B, N, width].
    With `mean_velocity` it takes a second time r [B] and predicts for the interval from t down to r (arXiv 2511.13019).
    """

    width: int
    depth: int
    num_heads: int
    embed: Callable  # width -> module: conditions -> [B, width]; see conditions.Condition
    patch_size: int = 1
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    mean_velocity: bool = False
    dtype: jnp.dtype = jnp.float32
    unroll: bool = False
    remat: Callable | None = None  # see layers.scan_blocks
    attend: Callable = attention.xla

    @nn.compact
    def __call__(self, x, t, condition, layers=(), r=None):
        grid = tuple(size // self.patch_size for size in x.shape[1:3])
        time = TimeEmbedding(self.width, xavier_linear, name="time_embed")(t)
        if self.mean_velocity:
            time = time + TimeEmbedding(self.width, xavier_linear, name="interval_embed")(interval(t, r))
        modulator = (time + self.embed(self.width)(condition))[:, None]

        tokens = patchify(x.astype(self.dtype), self.patch_size)
        y = patch_embedding(self.width, dtype=self.dtype, name="embed")(tokens)
        y = y + sincos_2d(*grid, self.width).astype(self.dtype)
        shape = {"depth": self.depth, "num_heads": self.num_heads}
        trunk = blocks(self, **shape, linear=xavier_linear, name="blocks", hidden=bool(layers))
        y, hidden = trunk(y, modulator, rope_2d(*grid, self.width // self.num_heads))
        y = FinalLayer(tokens.shape[-1], self.dtype, name="final_layer")(y, modulator)
        y = unpatchify(y, *grid, self.patch_size).astype(jnp.float32)
        return (y, hidden[jnp.asarray(layers)]) if layers else y
