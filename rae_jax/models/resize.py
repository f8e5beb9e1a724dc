"""Resize as torch does: bicubic, to the last bits, for images and position embeddings of encoders; bilinear for tokens.

`bilinear_tf1` resizes as TensorFlow 1, for Inception. jax.image.resize is no substitute for torch's bicubic: its kernel
has a = -0.5.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

_SHARP, _SMOOTH = -0.75, -0.5  # torch's `a` of the cubic kernel, without and with antialiasing


def bicubic(x, height, width, *, antialias=False):
    """Resize [..., H, W, C] to [..., height, width, C], float32, as torch's interpolate with align_corners=False."""
    rows, columns = (
        jnp.asarray(bicubic_weights(old, new, antialias), jnp.float32)
        for old, new in ((x.shape[-3], height), (x.shape[-2], width))
    )
    x = jnp.einsum("ih,...hwc->...iwc", rows, x.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("jw,...iwc->...ijc", columns, x, precision=jax.lax.Precision.HIGHEST)


def bilinear(x, height, width):
    """Resize [B, H, W, C] to [B, height, width, C] as torch's interpolate, align_corners=False, no antialiasing."""
    return jax.image.resize(x, (x.shape[0], height, width, x.shape[-1]), "bilinear", antialias=False)


def bilinear_tf1(x, height, width):
    """Resize [B, H, W, C] to [B, height, width, C], float32, as TensorFlow 1's resize_bilinear.

    Pixel i is read at i * old / new, without the usual shift of half a pixel, and without antialiasing.
    """
    x = _interpolate(x.astype(jnp.float32), 1, height)
    return _interpolate(x, 2, width)


def _interpolate(x, axis, new):
    """Resize one axis to `new` points by linear interpolation, as TensorFlow 1."""
    old = x.shape[axis]
    positions = np.arange(new, dtype=np.float32) * np.float32(old / new)
    low = positions.astype(int)
    share = (positions - low).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    first, second = (jnp.take(x, index, axis) for index in (low, np.minimum(low + 1, old - 1)))
    return first + (second - first) * share


@functools.cache
def bicubic_weights(old, new, antialias):
    """Return the matrix [new, old] that resizes one axis.

    Source: the definition of torch.nn.functional.interpolate. Its scale and positions are float32, with one rounding
    after a fused multiply-add; at 320 -> 224 px, rounding twice (or never) moves pixels by 1e-5.
    """
    scale = float(np.float32(old) / np.float32(new))
    if antialias:
        return _antialiased(old, new, scale)
    centres = np.float32(scale * (np.arange(new) + 0.5) - 0.5)
    first = np.floor(centres)
    fraction = (centres - first).astype(np.float64)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        column = np.clip(first.astype(int) + tap, 0, old - 1)  # pixels beyond the edge are the pixel at the edge
        np.add.at(weights, (np.arange(new), column), _cubic(fraction - tap, _SHARP))
    return weights


def _antialiased(old, new, scale):
    """Return the matrix of a kernel that is widened by the scale when it shrinks, cut at the edges and normalised."""
    widening = max(scale, 1.0)
    weights = np.zeros((new, old))
    for i in range(new):
        centre, support = float(np.float32(scale * (i + 0.5))), 2.0 * widening
        window = np.arange(max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), old))
        taps = _cubic((window + 0.5 - centre) / widening, _SMOOTH)
        weights[i, window] = taps / taps.sum()
    return weights


def _cubic(x, a):
    """Return the cubic convolution kernel (Keys 1981) at x."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
