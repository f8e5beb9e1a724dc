"""Discriminator heads on the frozen tokens of a vision transformer: StyleGAN-T's heads, as in VAR and RAE."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from rae_jax.models.mesh_matmul import gathered

KERNEL = 9
SPECTRAL_EPS = 1e-12


class SpectralConv(nn.Module):
    """Convolution over tokens [B, N, C], circular, its weight divided by its largest singular value.

    The collection 'spectral' holds the singular vectors. A forward pass updates them by one power iteration if the
    collection is mutable (in training), and does not change them otherwise.
    """

    features: int
    kernel: int

    @nn.compact
    def __call__(self, x):
        channels = x.shape[-1]
        bound = (self.kernel * channels) ** -0.5  # torch's initialisation of convolutions

        def uniform(key, shape):
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        weight = self.param("kernel", uniform, (self.kernel, channels, self.features))
        weight = gathered(weight, "kernel")
        bias = self.param("bias", uniform, (self.features,))
        weight = weight / self._largest_singular_value(weight)
        # One matrix product over shifted copies: XLA's convolution is many times slower on CPU.
        shifted = [jnp.roll(x, self.kernel // 2 - i, axis=1) for i in range(self.kernel)]
        return jnp.concatenate(shifted, -1) @ weight.reshape(-1, self.features) + bias

    def _largest_singular_value(self, weight):
        """Return the largest singular value, estimated by power iteration."""
        matrix = weight.reshape(-1, self.features)  # [kernel * C, features]

        def unit(vector):
            return vector / jnp.maximum(jnp.linalg.norm(vector), SPECTRAL_EPS)

        def draw(size):
            return unit(jax.random.normal(self.make_rng("params"), (size,), jnp.float32))

        u = self.variable("spectral", "u", draw, self.features)
        v = self.variable("spectral", "v", draw, matrix.shape[0])
        if self.is_mutable_collection("spectral"):
            fixed = jax.lax.stop_gradient(matrix)
            v.value = unit(fixed @ u.value)
            u.value = unit(fixed.T @ v.value)
        return v.value @ matrix @ u.value


class TokenNorm(nn.Module):
    """Normalise each channel of each sample over its tokens, with a learned scale and bias."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        x = x - x.mean(1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.square(x).mean(1, keepdims=True) + 1e-6) * scale + bias


class Head(nn.Module):
    """Tokens [B, N, C] of one layer -> logits [B, N]."""

    @nn.compact
    def __call__(self, x):
        x = self._layer(x, 1, "in")
        x = (x + self._layer(x, KERNEL, "mix")) / jnp.sqrt(2.0)
        return SpectralConv(1, 1, name="out")(x)[..., 0]

    def _layer(self, x, kernel, name):
        x = SpectralConv(x.shape[-1], kernel, name=f"{name}_conv")(x)
        return nn.leaky_relu(TokenNorm(name=f"{name}_norm")(x), 0.2)


class DiscriminatorHeads(nn.Module):
    """One head a layer: float32 tokens [L, B, N, C] -> logits [B, L * N]."""

    @nn.compact
    def __call__(self, tokens):
        logits = [Head(name=f"head{i}")(layer.astype(jnp.float32)) for i, layer in enumerate(tokens)]
        return jnp.concatenate(logits, axis=1)
