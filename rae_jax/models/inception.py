"""InceptionV3 for the Fréchet Inception Distance: the TensorFlow network of 2015, with other pooling than later ones.

Modules and their layers have the names of the published weights.
"""

import jax.numpy as jnp
from flax import linen as nn

from rae_jax.models import resize

SIZE = 299  # images are resized to this size
POOL, SPATIAL = 2048, 2023  # sizes of the features of FID and of sFID
_SPATIAL_CHANNELS = 7  # channels of the 17x17 features that ADM's sFID uses


class Inception(nn.Module):
    """Images [B, H, W, 3] in [0, 1] -> {'pool': [B, 2048], 'spatial': [B, 2023], 'logits': [B, 1008]}, float32.

    FID is computed from `pool`, sFID from `spatial`, the Inception Score from `logits` (without bias). Images should
    have 8 bits, as for all published numbers. Source: torch-fidelity, which follows the TensorFlow graph; `spatial`
    from ADM's evaluator (mixed_6/conv, here Mixed_6d.branch1x1).
    """

    @nn.compact
    def __call__(self, images):
        x = resize.bilinear_tf1(images * 255.0, SIZE, SIZE)
        x = (x - 128.0) / 128.0
        x = _conv("Conv2d_1a_3x3", x, 32, 3, strides=2, padding="VALID")
        x = _conv("Conv2d_2a_3x3", x, 32, 3, padding="VALID")
        x = _conv("Conv2d_2b_3x3", x, 64, 3)
        x = _shrink(x)
        x = _conv("Conv2d_3b_1x1", x, 80)
        x = _conv("Conv2d_4a_3x3", x, 192, 3, padding="VALID")
        x = _shrink(x)  # 35x35
        for name, pool_width in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = BlockA(pool_width, name=name)(x)
        x = BlockB(name="Mixed_6a")(x)  # 17x17
        x = BlockC(128, name="Mixed_6b")(x)
        x = BlockC(160, name="Mixed_6c")(x)
        x = BlockC(160, name="Mixed_6d")(x)
        spatial = x[..., :_SPATIAL_CHANNELS]  # branch1x1 comes first
        x = BlockC(192, name="Mixed_6e")(x)
        x = BlockD(name="Mixed_7a")(x)  # 8x8
        x = BlockE(_average, name="Mixed_7b")(x)
        x = BlockE(_maximum, name="Mixed_7c")(x)
        pool = x.mean((1, 2))
        logits = nn.Dense(1008, use_bias=False, name="fc")(pool)
        return {"pool": pool, "spatial": spatial.reshape(len(x), -1), "logits": logits}


class ConvNorm(nn.Module):
    """Convolution, batch norm with fixed statistics, ReLU."""

    width: int
    size: tuple
    strides: int
    padding: str

    @nn.compact
    def __call__(self, x):
        strides = (self.strides, self.strides)
        x = nn.Conv(self.width, self.size, strides, padding=self.padding, use_bias=False, name="conv")(x)
        return nn.relu(FixedNorm(name="bn")(x))


class FixedNorm(nn.Module):
    """Batch norm with fixed statistics: (x - mean) / sqrt(var + 1e-3), scaled and shifted."""

    @nn.compact
    def __call__(self, x):
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        kinds = {"mean": zeros, "var": ones, "scale": ones, "bias": zeros}
        p = {name: self.param(name, start, x.shape[-1:], jnp.float32) for name, start in kinds.items()}
        factor = p["scale"] / jnp.sqrt(p["var"] + 1e-3)
        return (x - p["mean"]) * factor + p["bias"]


class BlockA(nn.Module):
    """Block at 35x35: 1x1, 5x5, two 3x3, and average pooling."""

    pool_width: int

    @nn.compact
    def __call__(self, x):
        five = _conv("branch5x5_2", _conv("branch5x5_1", x, 48), 64, 5)
        three = _conv("branch3x3dbl_2", _conv("branch3x3dbl_1", x, 64), 96, 3)
        three = _conv("branch3x3dbl_3", three, 96, 3)
        pool = _conv("branch_pool", _average(x), self.pool_width)
        return jnp.concatenate([_conv("branch1x1", x, 64), five, three, pool], -1)


class BlockB(nn.Module):
    """Block from 35x35 to 17x17."""

    @nn.compact
    def __call__(self, x):
        one = _conv("branch3x3", x, 384, 3, strides=2, padding="VALID")
        two = _conv("branch3x3dbl_2", _conv("branch3x3dbl_1", x, 64), 96, 3)
        two = _conv("branch3x3dbl_3", two, 96, 3, strides=2, padding="VALID")
        return jnp.concatenate([one, two, _shrink(x)], -1)


class BlockC(nn.Module):
    """Block at 17x17: 1x1, 7x7 and two 7x7 as rows and columns, and average pooling."""

    inner_width: int

    @nn.compact
    def __call__(self, x):
        c = self.inner_width
        one = _conv("branch7x7_2", _conv("branch7x7_1", x, c), c, (1, 7))
        one = _conv("branch7x7_3", one, 192, (7, 1))
        two = _conv("branch7x7dbl_2", _conv("branch7x7dbl_1", x, c), c, (7, 1))
        two = _conv("branch7x7dbl_4", _conv("branch7x7dbl_3", two, c, (1, 7)), c, (7, 1))
        two = _conv("branch7x7dbl_5", two, 192, (1, 7))
        pool = _conv("branch_pool", _average(x), 192)
        return jnp.concatenate([_conv("branch1x1", x, 192), one, two, pool], -1)


class BlockD(nn.Module):
    """Block from 17x17 to 8x8."""

    @nn.compact
    def __call__(self, x):
        three = _conv("branch3x3_2", _conv("branch3x3_1", x, 192), 320, 3, strides=2, padding="VALID")
        seven = _conv("branch7x7x3_2", _conv("branch7x7x3_1", x, 192), 192, (1, 7))
        seven = _conv("branch7x7x3_3", seven, 192, (7, 1))
        seven = _conv("branch7x7x3_4", seven, 192, 3, strides=2, padding="VALID")
        return jnp.concatenate([three, seven, _shrink(x)], -1)


class BlockE(nn.Module):
    """Block at 8x8: 1x1, 3x3 and two 3x3 whose last part is a row and a column, and pooling."""

    pool: object  # the last block takes the maximum: an error of 2015 with which the weights were trained

    @nn.compact
    def __call__(self, x):
        one = _conv("branch3x3_1", x, 384)
        two = _conv("branch3x3dbl_2", _conv("branch3x3dbl_1", x, 448), 384, 3)
        branches = [
            _conv("branch1x1", x, 320),
            _conv("branch3x3_2a", one, 384, (1, 3)),
            _conv("branch3x3_2b", one, 384, (3, 1)),
            _conv("branch3x3dbl_3a", two, 384, (1, 3)),
            _conv("branch3x3dbl_3b", two, 384, (3, 1)),
            _conv("branch_pool", self.pool(x), 192),
        ]
        return jnp.concatenate(branches, -1)


def _conv(name, x, width, size=1, *, strides=1, padding="SAME"):
    size = size if isinstance(size, tuple) else (size, size)
    return ConvNorm(width, size, strides, padding, name=name)(x)


def _average(x):
    """Average pooling over 3x3 neighbours; neighbours beyond the edge do not count."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _maximum(x):
    return nn.max_pool(x, (3, 3), padding="SAME")


def _shrink(x):
    return nn.max_pool(x, (3, 3), strides=(2, 2))
