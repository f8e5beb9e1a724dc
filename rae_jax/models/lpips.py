"""LPIPS: the distance of two images in features of VGG16, weighted by human judgements (Zhang et al. 2018)."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from rae_jax.models.layers import gathered_convolution

# Of LPIPS, for images in [-1, 1].
_MEAN, _STD = np.float32((-0.030, -0.088, -0.188)), np.float32((0.458, 0.448, 0.450))
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
        # Two calls, not one batch: if b is a constant, its features are not differentiated.
        return self.linear(*(self.vgg(((2.0 * x - 1.0) - _MEAN) / _STD) for x in (a, b)))


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
    """Weighted sum over channels, [..., C] -> [...]."""

    @nn.compact
    def __call__(self, x):
        return (x * self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)).sum(-1)


def _unit(x):
    """Divide the vector at each position by its length + 1e-10; zeros stay zeros, with a gradient of 0 and not NaN."""
    x = x.astype(jnp.float32)
    squares = jnp.square(x).sum(-1, keepdims=True)
    positive = squares > 0
    return x / (jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0) + _EPS)
