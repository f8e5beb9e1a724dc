"""Layers that the encoders, the decoder and the diffusion transformers share.

A `linear` argument says how a block's linear layers start: `torch_linear`, `xavier_linear` or `lecun_linear`.
Parameters are float32; matrix products run in `dtype`; norms, softmax and angles in float32.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from rae_jax.models import attention
from rae_jax.models.dense import PRODUCT, Dense
from rae_jax.models.mesh_matmul import gathered


def gathered_convolution(x, kernel, *arguments, **options):
    """jax.lax.conv_general_dilated for nn.Conv, whose kernel is gathered first; see Dense."""
    return jax.lax.conv_general_dilated(x, gathered(kernel, "kernel"), *arguments, **options)


def torch_linear(features, fan_in, *, kernel_init=None, **options):
    """Dense layer that starts as torch's Linear does: weight and bias from U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    `kernel_init` is for a weight that starts otherwise.
    """
    bound = fan_in**-0.5

    def uniform(key, shape, param_dtype=jnp.float32):
        return jax.random.uniform(key, shape, param_dtype, -bound, bound)

    return Dense(features, kernel_init=kernel_init or uniform, bias_init=uniform, **options)


def xavier_linear(features, fan_in, *, kernel_init=nn.initializers.xavier_uniform(), **options):  # noqa: B008
    """Dense layer whose weight starts Xavier-uniform (or by `kernel_init`) and whose bias starts at zero."""
    return Dense(features, kernel_init=kernel_init, **options)


def lecun_linear(features, fan_in, **options):
    """Dense layer that starts as flax's own does: a normal weight of variance 1 / fan_in, no bias."""
    return Dense(features, **options)


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B, N, D] with one fused qkv product.

    `rope`: angles [N, K] by which queries and keys are turned, see `rotate`. `attend`: one of `attention`'s functions.
    """

    num_heads: int
    qk_norm: bool = False
    dtype: jnp.dtype = jnp.float32
    linear: Callable = lecun_linear
    rotate_halves: bool = False
    attend: Callable = attention.xla

    @nn.compact
    def __call__(self, x, rope=None):
        width = x.shape[-1]
        qkv = self.linear(3 * width, width, dtype=self.dtype, parts=3, name="qkv")(x)
        q, k, v = (a.reshape(*x.shape[:2], self.num_heads, -1) for a in qkv)  # each [B, N, H, K]
        if self.qk_norm:
            q, k = rms_norm("q_norm")(q), rms_norm("k_norm")(k)
        if rope is not None:
            q, k = (rotate(a, rope, halves=self.rotate_halves) for a in (q, k))
        q, k, v = (a.astype(self.dtype) for a in (q, k, v))
        x = self.attend(q, k, v).reshape(x.shape)
        # Attention's own result is kept: this is the cheapest of a block's products to make again from it.
        return self.linear(width, width, dtype=self.dtype, kept=False, name="proj")(x)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, exact or in its tanh approximation."""

    hidden: int
    dtype: jnp.dtype = jnp.float32
    approximate: bool = False

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        x = Dense(self.hidden, dtype=self.dtype, name="fc1")(x)
        return Dense(width, dtype=self.dtype, name="fc2")(nn.gelu(x, approximate=self.approximate))


class SwiGlu(nn.Module):
    """Gated MLP: w3(silu(w1 x) * w2 x), w1 and w2 fused."""

    hidden: int
    dtype: jnp.dtype = jnp.float32
    linear: Callable = torch_linear

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        gate, value = self.linear(2 * self.hidden, width, dtype=self.dtype, parts=2, name="w12")(x)
        return self.linear(width, self.hidden, dtype=self.dtype, name="w3")(nn.silu(gate) * value)


def rms_norm(name):
    """x / rms(x) with a learned scale, in float32."""
    return nn.RMSNorm(epsilon=1e-6, dtype=jnp.float32, name=name)


def rope_2d(height, width, head_dim):
    """Angles [height * width, head_dim] of 2-D rotary embedding at integer positions, row by row.

    The first half of a head turns with the row, the second with the column; each frequency turns one
    interleaved pair of channels.
    """
    half = head_dim // 2
    frequencies = np.repeat(10000.0 ** -(np.arange(0, half, 2) / half), 2)  # [head_dim / 2]
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    angles = np.stack([rows, columns], -1).reshape(-1, 2, 1) * frequencies
    return jnp.asarray(angles.reshape(height * width, head_dim), jnp.float32)


def rope_centred(height, width, head_dim):
    """Angles [height * width, head_dim] of DINOv3's rotary embedding, row by row.

    A patch stands where its centre is, the image reaching from -1 to 1 both ways, whatever its size. A quarter of
    a head turns with the row, the next with the column; the second half of the head pairs with the first.
    """
    half = head_dim // 2
    frequencies = 2 * np.pi * 100.0 ** -(np.arange(0, half, 2) / half)  # [head_dim / 4]
    centres = (2 * (np.arange(size) + 0.5) / size - 1 for size in (height, width))
    positions = np.stack(np.meshgrid(*centres, indexing="ij"), -1)
    angles = (positions.reshape(-1, 2, 1) * frequencies).reshape(height * width, half)
    return jnp.asarray(np.tile(angles, 2), jnp.float32)


def rotate(x, angles, *, halves=False):
    """Turn channel pairs (a, b) of x [B, N, H, K] by angles [N, K], in float32.

    A pair is two neighbours, or with `halves` the same channel of either half of the head.
    """
    turned = jax.lax.platform_dependent(
        x,
        tpu=functools.partial(_turned_by_product, halves=halves),
        default=functools.partial(_turned, halves=halves),
    )
    return x.astype(jnp.float32) * jnp.cos(angles)[:, None] + turned * jnp.sin(angles)[:, None]


def _turned(x, *, halves):
    """(-b, a) for each pair (a, b) of channels, in float32."""
    shape, axis = ((2, -1), -2) if halves else ((-1, 2), -1)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], *shape)
    signs = np.array([[-1.0], [1.0]] if halves else [-1.0, 1.0], np.float32)
    return (jnp.flip(pairs, axis) * signs).reshape(x.shape)


def _turned_by_product(x, *, halves):
    """The same by a matrix of 0, 1 and -1, exactly: channels lie across a TPU's lanes, where moving them costs more."""
    turn = _turned(jnp.eye(x.shape[-1]), halves=halves).astype(x.dtype)
    options = {"precision": "highest", "preferred_element_type": jnp.float32}
    return jnp.einsum("bnhk,kj->bnhj", x, turn, **options)


def sincos_2d(height, width, dim):
    """Fixed sin-cos position embedding [height * width, dim]: columns in the first half, rows in the second."""
    frequencies = 10000.0 ** -(np.arange(dim // 4) / (dim / 4))
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    parts = []
    for position in (columns, rows):
        angles = position.reshape(-1, 1) * frequencies
        parts += [np.sin(angles), np.cos(angles)]
    return jnp.asarray(np.concatenate(parts, -1), jnp.float32)


# Policies of rematerialisation. KEEP_PRODUCTS keeps the output of attention and of the products with kernels, except the
# product after attention, which is cheap to compute again; so nothing of the size of the attention weights is kept.
KEEP_PRODUCTS = jax.checkpoint_policies.save_only_these_names(PRODUCT)
KEEP_NOTHING = jax.checkpoint_policies.nothing_saveable


def scan_blocks(block, *, depth, unroll, remat, broadcast):
    """Repeat a block `depth` times under one scan; its parameters gain a leading axis of that size.

    `block` maps (x, *args) to (x, output); `broadcast` counts the args, which are the same for every repetition. The
    outputs come back stacked. `remat`: None, or a policy of what a backward pass finds and does not compute again.
    The parameters do not depend on `unroll` or `remat`.
    """
    if remat is not None:
        # A loop keeps XLA from undoing it; without a loop, a barrier has to.
        block = nn.remat(block, policy=remat, prevent_cse=unroll)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * broadcast,
        length=depth,
        unroll=depth if unroll else 1,
    )


def patchify(images, patch_size):
    """[B, H, W, C] -> [B, N, p * p * C], tokens row by row."""
    b, height, width, c = images.shape
    p = patch_size
    x = images.reshape(b, height // p, p, width // p, p, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (height // p) * (width // p), p * p * c)


def unpatchify(tokens, height, width, patch_size):
    """[B, height * width, p * p * C] -> [B, height * p, width * p, C]: patchify undone."""
    b, p = tokens.shape[0], patch_size
    x = tokens.reshape(b, height, width, p, p, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, height * p, width * p, -1)
