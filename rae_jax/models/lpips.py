"""LPIPS: the distance of two images in the features of VGG16, weighted as people judge (Zhang et al. 2018)."""

import jax.numpy as jnp
from flax import linen as nn

from rae_jax.models.layers import gathered_convolution

_MEAN, _STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # LPIPS' own, of images in [-1, 1]
_EPS = 1e-10


class Vgg16(nn.Module):
    """Normalised images [B, H, W, 3] -> the features after relu1_2, 2_2, 3_3, 4_3 and 5_3, each [B, h, w, C].

    H and W are at least 16. Source: Simonyan and Zisserman, arXiv 1409.1556, configuration D.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        features = []
        for level, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), start=1):
            if features:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for i in range(1, depth + 1):
                x = nn.relu(_convolution(width, self.dtype, f"conv{level}_{i}")(x))
            features.append(x)
        return features


def _convolution(width, dtype, name):
    return nn.Conv(width, (3, 3), dtype=dtype, conv_general_dilated=gathered_convolution, name=name)


class Lpips(nn.Module):
    """Images a and b [B, H, W, 3] in [0, 1] -> their distances [B], float32; convolutions in `dtype`."""

    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.vgg = Vgg16(self.dtype)
        self.linear = Weights()

    def __call__(self, a, b):
        # One after the other, not as one batch: where b is a constant, nothing is differentiated through its features.
        return self.linear(*(self.vgg(((2.0 * x - 1.0) - jnp.asarray(_MEAN)) / jnp.asarray(_STD)) for x in (a, b)))


class Weights(nn.Module):
    """Features of two images, level by level -> distances [B]: squared differences of unit vectors, weighted."""

    @nn.compact
    def __call__(self, a, b):
        distances = 0.0
        for level, pair in enumerate(zip(a, b, strict=True)):
            one, other = map(_unit, pair)
            distances += Weight(name=f"lin{level}")(jnp.square(one - other)).mean((1, 2))
        return distances


class Weight(nn.Module):
    """[..., C] -> [...]: the sum over channels, each times its weight."""

    @nn.compact
    def __call__(self, x):
        return (x * self.param("scale", nn.initializers.ones, x.shape[-1:])).sum(-1)


def _unit(x):
    """Each position's vector over its length + 1e-10; zeros stay zeros, and have no gradient instead of NaN."""
    x = x.astype(jnp.float32)
    squares = jnp.square(x).sum(-1, keepdims=True)
    some = squares > 0
    return x / (jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1.0)), 0.0) + _EPS)
