"""Layers that the encoders, the decoder and the diffusion transformers share.

The argument `linear` is the initialisation of a block's linear layers: `torch_linear`, `xavier_linear`, `lecun_linear`.
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
    """Return jax.lax.conv_general_dilated with the kernel gathered first, for nn.Conv; see mesh_matmul.gathered."""
    return jax.lax.conv_general_dilated(x, gathered(kernel, "kernel"), *arguments, **options)


def torch_linear(features, fan_in, *, kernel_init=None, **options):
    """Return a Dense layer with torch's initialisation: weight and bias from U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

    `kernel_init` is another initialiser of the weight.
    """
    bound = fan_in**-0.5

    def uniform(key, shape, param_dtype=jnp.float32):
        return jax.random.uniform(key, shape, param_dtype, -bound, bound)

    return Dense(features, kernel_init=kernel_init or uniform, bias_init=uniform, **options)


def xavier_linear(features, fan_in, *, kernel_init=nn.initializers.xavier_uniform(), **options):  # noqa: B008
    """Return a Dense layer with a Xavier-uniform initial weight (or by `kernel_init`) and a bias of zero."""
    return Dense(features, kernel_init=kernel_init, **options)


def lecun_linear(features, fan_in, **options):
    """Return a Dense layer with flax's initialisation: a normal weight of variance 1 / fan_in, a bias of zero."""
    return Dense(features, **options)


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B, N, D] with one fused qkv product.

    `rope`: angles [N, K] by which queries and keys are rotated, see `rotate`. `attend`: a function of module attention.
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
        # The result of `attend` is kept: from it, this product is the cheapest product of a block to compute again.
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
    """Return the norm x / rms(x) with a learned scale, in float32."""
    return nn.RMSNorm(epsilon=1e-6, dtype=jnp.float32, name=name)


def rope_2d(height, width, head_dim):
    """Return angles [height * width, head_dim] of 2-D rotary embedding at integer positions, row by row.

    The first half of a head rotates with the row, the second with the column; each frequency rotates one interleaved
    pair of channels.
    """
    half = head_dim // 2
    frequencies = np.repeat(10000.0 ** -(np.arange(0, half, 2) / half), 2)  # [head_dim / 2]
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    angles = np.stack([rows, columns], -1).reshape(-1, 2, 1) * frequencies
    return jnp.asarray(angles.reshape(height * width, head_dim), jnp.float32)


def rope_centred(height, width, head_dim):
    """Return angles [height * width, head_dim] of DINOv3's rotary embedding, row by row.

    The position of a patch is its centre; an image of any size reaches from -1 to 1 along both axes. The first quarter
    of a head rotates with the row, the second with the column; the second half of the head pairs with the first.
    """
    half = head_dim // 2
    frequencies = 2 * np.pi * 100.0 ** -(np.arange(0, half, 2) / half)  # [head_dim / 4]
    centres = (2 * (np.arange(size) + 0.5) / size - 1 for size in (height, width))
    positions = np.stack(np.meshgrid(*centres, indexing="ij"), -1)
    angles = (positions.reshape(-1, 2, 1) * frequencies).reshape(height * width, half)
    return jnp.asarray(np.tile(angles, 2), jnp.float32)


def rotate(x, angles, *, halves=False):
    """Rotate channel pairs (a, b) of x [B, N, H, K] by angles [N, K], in float32.

    A pair is two neighbours, or with `halves` the same channel of both halves of the head.
    """
    turned = jax.lax.platform_dependent(
        x,
        tpu=functools.partial(_quarter_turn_by_product, halves=halves),
        default=functools.partial(_quarter_turn, halves=halves),
    )
    return x.astype(jnp.float32) * jnp.cos(angles)[:, None] + turned * jnp.sin(angles)[:, None]


def _quarter_turn(x, *, halves):
    """Return (-b, a) for each pair (a, b) of channels, in float32."""
    shape, axis = ((2, -1), -2) if halves else ((-1, 2), -1)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], *shape)
    signs = np.array([[-1.0], [1.0]] if halves else [-1.0, 1.0], np.float32)
    return (jnp.flip(pairs, axis) * signs).reshape(x.shape)


def _quarter_turn_by_product(x, *, halves):
    """Return _quarter_turn, exactly, by a matrix of 0, 1 and -1: to move channels between a TPU's lanes costs more."""
    turn = _quarter_turn(jnp.eye(x.shape[-1], dtype=jnp.float32), halves=halves).astype(x.dtype)
    options = {"precision": "highest", "preferred_element_type": jnp.float32}
    return jnp.einsum("bnhk,kj->bnhj", x, turn, **options)


def sincos_2d(height, width, dim):
    """Return a fixed sin-cos position embedding [height * width, dim]: first half columns, second half rows."""
    frequencies = 10000.0 ** -(np.arange(dim // 4) / (dim / 4))
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    parts = []
    for position in (columns, rows):
        angles = position.reshape(-1, 1) * frequencies
        parts += [np.sin(angles), np.cos(angles)]
    return jnp.asarray(np.concatenate(parts, -1), jnp.float32)


# Policies of rematerialisation. KEEP_PRODUCTS keeps the outputs of attention and of products with kernels, except the
# product after attention, which is cheap to compute again. It keeps no array of the size of the attention weights.
KEEP_PRODUCTS = jax.checkpoint_policies.save_only_these_names(PRODUCT)
KEEP_NOTHING = jax.checkpoint_policies.nothing_saveable


def scan_blocks(block, *, depth, unroll, remat, broadcast):
    """Return a block repeated `depth` times by one scan; its parameters get a leading axis of size `depth`.

    `block` maps (x, *args) to (x, output); `broadcast` is the number of args, which are the same for every repetition.
    The outputs are returned stacked. `remat`: None, or a policy that names the values which are kept for a backward
    pass. The parameters do not depend on `unroll` or `remat`.
    """
    if remat is not None:
        # XLA could merge the second computation with the first: a loop prevents this, or without a loop a barrier.
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
    """Cut images [B, H, W, C] into tokens [B, N, p * p * C], row by row."""
    b, height, width, c = images.shape
    p = patch_size
    x = images.reshape(b, height // p, p, width // p, p, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (height // p) * (width // p), p * p * c)


def unpatchify(tokens, height, width, patch_size):
    """Join tokens [B, height * width, p * p * C] to images [B, height * p, width * p, C]: the inverse of patchify."""
    b, p = tokens.shape[0], patch_size
    x = tokens.reshape(b, height, width, p, p, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, height * p, width * p, -1)
