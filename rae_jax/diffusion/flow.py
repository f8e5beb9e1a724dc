"""Flow matching: paths between data (t = 0) and noise (t = 1), predictions of a model on a path, and times.

x_t = alpha(t) x + sigma(t) noise, velocity = d x_t / d t. Times are [B]; x, x_t, noise and velocities are [B, ...].
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

REFERENCE_DIM = 4096  # the latent dimension whose schedule is not shifted


@dataclasses.dataclass(frozen=True)
class Path:
    """The coefficients of data and noise as functions of time."""

    alpha: Callable
    sigma: Callable

    def at(self, t, x):
        """Return (alpha, sigma, d alpha / dt, d sigma / dt) at times t [B], with shapes that multiply x [B, ...]."""
        t = t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
        (alpha, d_alpha), (sigma, d_sigma) = (jax.jvp(f, (t,), (jnp.ones_like(t),)) for f in (self.alpha, self.sigma))
        return alpha, sigma, d_alpha, d_sigma


def _log_sigma(t):
    """Return log sigma of the variance-preserving path, with noise rates of 0.1 to 20 (Song et al. 2021)."""
    rest = 1.0 - t
    return -0.25 * rest**2 * (20.0 - 0.1) - 0.5 * rest * 0.1


LINEAR = Path(lambda t: 1.0 - t, lambda t: t)
COSINE = Path(lambda t: jnp.cos(0.5 * jnp.pi * t), lambda t: jnp.sin(0.5 * jnp.pi * t))
VP = Path(lambda t: jnp.sqrt(-jnp.expm1(2.0 * _log_sigma(t))), lambda t: jnp.exp(_log_sigma(t)))


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The quantity that a model predicts on a path."""

    path: Path
    target: Callable  # (x, noise, t) -> the quantity at x_t, which the loss compares with the model's output
    to_velocity: Callable  # (output, x_t, t) -> velocity
    first: float  # the sampler's first time; `to_velocity` is defined from `first` to `last`
    last: float  # the sampler's last time
    latest: float = 0.999  # the largest time of training, before the shift
    weight: Callable | None = None  # t -> the weight of a squared difference from the target; None: 1
    steep_at_data: bool = False  # `to_velocity` divides by sigma, which is zero at data, so that errors grow there


class Velocity(NamedTuple):
    """A velocity in two halves: trunk(x, t) -> s, the costly one, and head(x, t, s) -> velocity.

    The output of the trunk changes slowly with time, so a sampler may use it in several steps.
    """

    trunk: Callable
    head: Callable

    def __call__(self, x, t):
        return self.head(x, t, self.trunk(x, t))


def undivided(velocity_fn):
    """Return the `Velocity` whose trunk is empty and whose head is velocity_fn(x, t)."""
    return Velocity(lambda x, t: (), lambda x, t, s: velocity_fn(x, t))


def interpolate(x, noise, t, path=LINEAR):
    """Return the point x_t of the path between data and noise."""
    alpha, sigma, _, _ = path.at(t, x)
    return alpha * x + sigma * noise


def velocity(x, noise, t, path=LINEAR):
    """Return d x_t / dt; on the linear path this is noise - x at every time."""
    _, _, d_alpha, d_sigma = path.at(t, x)
    return d_alpha * x + d_sigma * noise


def noise_of(v, x_t, t, path=LINEAR):
    """Return the noise that corresponds to a velocity at x_t. The score is -noise / sigma."""
    alpha, sigma, d_alpha, d_sigma = path.at(t, x_t)
    return (alpha * v - d_alpha * x_t) / (alpha * d_sigma - d_alpha * sigma)


def data_of(v, x_t, t, path=LINEAR):
    """Return the data that correspond to a velocity at x_t."""
    alpha, sigma, d_alpha, d_sigma = path.at(t, x_t)
    return (d_sigma * x_t - sigma * v) / (alpha * d_sigma - d_alpha * sigma)


def velocity_from_noise(noise, x_t, t, path=LINEAR):
    """Return the velocity that corresponds to a predicted noise at x_t; not defined at t = 1."""
    alpha, sigma, d_alpha, d_sigma = path.at(t, x_t)
    return d_alpha * (x_t - sigma * noise) / alpha + d_sigma * noise


def velocity_from_data(x, x_t, t, path=LINEAR):
    """Return the velocity that corresponds to predicted data at x_t; not defined at t = 0."""
    alpha, sigma, d_alpha, d_sigma = path.at(t, x_t)
    return d_alpha * x + d_sigma * (x_t - alpha * x) / sigma


LEAST_DIVISOR = 0.05  # of clamped_velocity (arXiv 2605.18324)


def clamped_velocity(x, x_t, t):
    """Return the velocity (x_t - x) / max(t, 0.05) of predicted data on the linear path, defined at all times."""
    divisor = jnp.maximum(t, LEAST_DIVISOR)
    return (x_t - x) / divisor.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def clamped_weight(t):
    """Return the weight that turns a squared difference of data into one of their `clamped_velocity`."""
    return 1.0 / jnp.square(jnp.maximum(t, LEAST_DIVISOR))


def shift_factor(latent_shape):
    """Return the dimension-dependent shift sqrt(h w D / 4096) of a latent [h, w, D] (paper, section 4.2)."""
    return math.sqrt(math.prod(latent_shape) / REFERENCE_DIM)


def shift_time(t, factor):
    """Return times shifted towards noise: a t / (1 + (a - 1) t), with a = `factor`."""
    return factor * t / (1.0 + (factor - 1.0) * t)


def logit_normal_time(key, batch_size, *, mean, std, low, high):
    """Draw times [B] whose logits are normal, from this distribution truncated to [low, high], not clipped to it."""
    ends = (jax.scipy.special.logit(jnp.array([low, high], jnp.float32)) - mean) / std
    normal = jax.random.truncated_normal(key, ends[0], ends[1], (batch_size,), jnp.float32)
    return jnp.clip(jax.nn.sigmoid(mean + std * normal), low, high)


def uniform_time(key, batch_size, *, low, high):
    """Draw times [B], uniform on [low, high]."""
    return jax.random.uniform(key, (batch_size,), jnp.float32, minval=low, maxval=high)
