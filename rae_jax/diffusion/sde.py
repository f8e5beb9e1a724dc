"""Stochastic sampling: the reverse SDE dx = (v - w score) dt + sqrt(2 w) dW, whose marginals are the flow's for any w.

Source: SiT (arXiv 2401.08740). `velocity_fn(x, t)` takes x [B, ...] and times t [B]; diffusion coefficients w are
functions (x, t, path) -> an array that multiplies x; w = 0 gives the flow.
"""

import jax
import jax.numpy as jnp

from rae_jax.diffusion import flow


def constant(x, t, path):
    """Return w = 1."""
    return jnp.ones_like(x)


def score_based(x, t, path):
    """Return the w of the forward SDE of the path; infinite at t = 1."""
    alpha, sigma, d_alpha, d_sigma = path.at(t, x)
    return sigma * d_sigma - d_alpha / alpha * jnp.square(sigma)


def sigma(x, t, path):
    """Return w = sigma(t)."""
    return path.at(t, x)[1]


def linear(x, t, path):
    """Return w = t."""
    return flow.LINEAR.at(t, x)[1]


def decreasing(x, t, path):
    """Return w = (1 - cos(pi t))^2 / 4: 1 at noise, 0 at data."""
    return 0.25 * jnp.square(1.0 - jnp.cos(jnp.pi * linear(x, t, path)))


def increasing_decreasing(x, t, path):
    """Return w = sin(pi t)^2: 0 at both ends."""
    return jnp.square(jnp.sin(jnp.pi * linear(x, t, path)))


def euler_maruyama(velocity_fn, x, times, *, noise_fn, diffusion_fn, path=flow.LINEAR):
    """Take Euler-Maruyama steps from x at times[0] to times[-1]; one evaluation per step.

    `noise_fn(n)` draws the standard normal noise of the n-th step, with the shape of x. A last step (`mean_step`,
    `tweedie_step`, `euler_step`) then leads to data.
    """

    def step(x, interval):
        n, t, t_next = interval
        v, score = _velocity_and_score(velocity_fn, x, t, path)
        w = diffusion_fn(x, jnp.full(x.shape[:1], t, jnp.float32), path)
        x = x + (t_next - t) * (v - w * score) + jnp.sqrt(2.0 * w * (t - t_next)) * noise_fn(n)
        return x, None

    return jax.lax.scan(step, x, (jnp.arange(len(times) - 1), times[:-1], times[1:]))[0]


def mean_step(velocity_fn, x, t, *, diffusion_fn, path=flow.LINEAR):
    """Take one step from time t to data along the SDE's drift, without noise."""
    v, score = _velocity_and_score(velocity_fn, x, t, path)
    return x - t * (v - diffusion_fn(x, jnp.full(x.shape[:1], t, jnp.float32), path) * score)


def tweedie_step(velocity_fn, x, t, *, path=flow.LINEAR):
    """Return the expected data given x at time t: (x_t + sigma^2 score) / alpha."""
    _, score = _velocity_and_score(velocity_fn, x, t, path)
    alpha, sigma, _, _ = path.at(jnp.full(x.shape[:1], t, jnp.float32), x)
    return (x + jnp.square(sigma) * score) / alpha


def euler_step(velocity_fn, x, t):
    """Take one step from time t to data along the flow."""
    return x - t * velocity_fn(x, jnp.full(x.shape[:1], t, jnp.float32))


def _velocity_and_score(velocity_fn, x, t, path):
    t = jnp.full(x.shape[:1], t, jnp.float32)
    v = velocity_fn(x, t)
    return v, -flow.noise_of(v, x, t, path) / path.at(t, x)[1]
