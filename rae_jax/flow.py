"""Flow matching on the linear path: t = 0 is data, t = 1 is noise.

x_t = (1 - t) x + t noise, velocity = noise - x. Times are [B]; x is [B, ...].
"""

import math

import jax
import jax.numpy as jnp

MAX_TIME = 0.999  # training never sees pure noise; the published sampler starts here
REFERENCE_DIM = 4096  # the latent dimension whose schedule is not shifted


def shift_factor(latent_shape):
    """Dimension-dependent shift sqrt(h w D / 4096) of a latent [h, w, D] (paper, section 4.2)."""
    return math.sqrt(math.prod(latent_shape) / REFERENCE_DIM)


def shift_time(t, factor):
    """Move times towards the noise: a t / (1 + (a - 1) t)."""
    return factor * t / (1.0 + (factor - 1.0) * t)


def sample_time(key, batch_size, *, factor, mean=0.0, std=1.0):
    """Shifted training times [B]: logit-normal(mean, std), truncated to [0, 0.999], then shifted."""
    t = jax.nn.sigmoid(mean + std * jax.random.normal(key, (batch_size,)))
    return shift_time(jnp.minimum(t, MAX_TIME), factor)


def interpolate(x, noise, t):
    """The point x_t of the path between data and noise."""
    t = _like(t, x)
    return (1.0 - t) * x + t * noise


def velocity(x, noise):
    """d x_t / dt of the linear path."""
    return noise - x


def _like(t, x):
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
