"""The parts of a diffusion transformer: embeddings of time and label, adaLN blocks, final layer.

Conditions are [B, 1, C] (one for all tokens) or [B, N, C] (one a token).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from rae_jax.models.layers import Attention, SwiGlu, dense, rms_norm

NUM_FREQUENCIES = 256
_SMALL = nn.initializers.normal(0.02)
_ZEROS = nn.initializers.zeros


class TimeEmbedding(nn.Module):
    """Times [B] -> [B, width]: fixed random Fourier features, then an MLP, all in float32."""

    width: int

    @nn.compact
    def __call__(self, t):
        # A stored constant: it lives with the parameters, and no gradient ever reaches it.
        frequencies = self.param("frequencies", nn.initializers.normal(1.0), (NUM_FREQUENCIES,))
        angles = 2.0 * jnp.pi * t[:, None] * jax.lax.stop_gradient(frequencies)
        x = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        x = nn.silu(nn.Dense(self.width, kernel_init=_SMALL, name="fc1")(x))
        return nn.Dense(self.width, kernel_init=_SMALL, name="fc2")(x)


class LabelEmbedding(nn.Module):
    """Labels [B] -> [B, width]; the row after the last class stands for no label."""

    num_classes: int
    width: int

    @nn.compact
    def __call__(self, labels):
        table = self.param("table", _SMALL, (self.num_classes + 1, self.width))
        return table[labels]


class Modulation(nn.Module):
    """SiLU, then a linear layer that starts at zero: `count` tensors of x's width from a condition."""

    count: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, condition):
        condition = nn.silu(condition).astype(self.dtype)
        linear = dense(self.count * self.width, dtype=self.dtype, kernel_init=_ZEROS, bias_init=_ZEROS, name="linear")
        return jnp.split(linear(condition), self.count, -1)


class Block(nn.Module):
    """Attention and SwiGLU, each between an adaLN shift/scale and a gate."""

    num_heads: int
    mlp_ratio: float
    qk_norm: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, condition, rope):
        modulation = Modulation(6, x.shape[-1], self.dtype, name="modulation")(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        y = modulate(rms_norm("norm1")(x), shift1, scale1).astype(self.dtype)
        attention = Attention(self.num_heads, self.qk_norm, self.dtype, torch_init=True, name="attention")
        x = x + gate1 * attention(y, rope)
        y = modulate(rms_norm("norm2")(x), shift2, scale2).astype(self.dtype)
        x = x + gate2 * SwiGlu(int(2 / 3 * self.mlp_ratio * x.shape[-1]), self.dtype, name="mlp")(y)
        return x, None


class FinalLayer(nn.Module):
    """RMSNorm, shift/scale from the condition, and a linear layer that starts at zero."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, condition):
        shift, scale = Modulation(2, x.shape[-1], self.dtype, name="modulation")(condition)
        x = modulate(rms_norm("norm")(x), shift, scale).astype(self.dtype)
        return dense(self.features, dtype=self.dtype, kernel_init=_ZEROS, bias_init=_ZEROS, name="linear")(x)


def patch_embedding(width, *, dtype, name):
    """Linear embedding of latent tokens (patch 1)."""
    return dense(width, dtype=dtype, kernel_init=nn.initializers.xavier_uniform(), name=name)


def modulate(x, shift, scale):
    """x (1 + scale) + shift."""
    return x * (1.0 + scale) + shift
