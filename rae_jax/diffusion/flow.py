"""Flow matching: paths between data (t = 0) and noise (t = 1), predictions of a model on them, and times.

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
        """(alpha, sigma, d alpha / dt, d sigma / dt) at times t [B], shaped to multiply x [B, ...]."""
        t = t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
        (alpha, d_alpha), (sigma, d_sigma) = (jax.jvp(f, (t,), (jnp.ones_like(t),)) for f in (self.alpha, self.sigma))
        return alpha, sigma, d_alpha, d_sigma


def _log_sigma(t):
    """Of the variance-preserving path: noise rates rise from 0.1 to 20 on the way to data (Song et al. 2021)."""
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
    first: float  # the times between which `to_velocity` is defined, from the sampler's first one to its last one
    last: float


class Velocity(NamedTuple):
    """A velocity in two halves: trunk(x, t) -> s, the costly one, and head(x, t, s) -> velocity.

    The output of the trunk changes slowly with time: a sampler may use it for more than one step.
    """

    trunk: Callable
    head: Callable

    def __call__(self, x, t):
        return self.head(x, t, self.trunk(x, t))


def undivided(velocity_fn):
    """Return the `Velocity` whose trunk is empty and whose head is velocity_fn(x, t)."""
    return Velocity(lambda x, t: (), lambda x, t, s: velocity_fn(x, t))


def interpolate(x, noise, t, path=LINEAR):
    """The point x_t of the path between data and noise."""
    alpha, sigma, _, _ = path.at(t, x)
    return alpha * x + sigma * noise


def velocity(x, noise, t, path=LINEAR):
    """d x_t / dt; noise - x on the linear path, at any time."""
    _, _, d_alpha, d_sigma = path.at(t, x)
    return d_alpha * x + d_sigma * noise


def noise_of(v, x_t, t, path=LINEAR):
    """The noise that goes with a velocity at x_t. The score is -noise / sigma."""
    alpha, sigma, d_alpha, d_sigma = path.at(t, x_t)
    return (alpha * v - d_alpha * x_t) / (alpha * d_sigma - d_alpha * sigma)


def data_of(v, x_t, t, path=LINEAR):
    """The data that goes with a velocity at x_t."""
    alpha, sigma, d_alpha, d_sigma = path.at(t, x_t)
    return (d_sigma * x_t - sigma * v) / (alpha * d_sigma - d_alpha * sigma)


def velocity_from_noise(noise, x_t, t, path=LINEAR):
    """The velocity that goes with a predicted noise at x_t; not defined at t = 1."""
    alpha, sigma, d_alpha, d_sigma = path.at(t, x_t)
    return d_alpha * (x_t - sigma * noise) / alpha + d_sigma * noise


def velocity_from_data(x, x_t, t, path=LINEAR):
    """The velocity that goes with predicted data at x_t; not defined at t = 0."""
    alpha, sigma, d_alpha, d_sigma = path.at(t, x_t)
    return d_alpha * x + d_sigma * (x_t - alpha * x) / sigma


def shift_factor(latent_shape):
    """Dimension-dependent shift sqrt(h w D / 4096) of a latent [h, w, D] (paper, section 4.2)."""
    return math.sqrt(math.prod(latent_shape) / REFERENCE_DIM)


def shift_time(t, factor):
    """Move times towards the noise: a t / (1 + (a - 1) t)."""
    return factor * t / (1.0 + (factor - 1.0) * t)


def logit_normal_time(key, batch_size, *, mean, std, low, high):
    """Times [B] whose logits are normal, truncated to [low, high] as a distribution: nothing piles up at the ends."""
    ends = (jax.scipy.special.logit(jnp.array([low, high], jnp.float32)) - mean) / std
    normal = jax.random.truncated_normal(key, ends[0], ends[1], (batch_size,))
    return jnp.clip(jax.nn.sigmoid(mean + std * normal), low, high)


def uniform_time(key, batch_size, *, low, high):
    """Times [B], uniform on [low, high]."""
    return jax.random.uniform(key, (batch_size,), minval=low, maxval=high)
