"""Solvers that carry noise (t = 1) to data (t = 0) along velocity_fn(x, t).

`velocity_fn(x, t)` takes x [B, ...] and times t [B].
"""

import jax
import jax.numpy as jnp

from rae_jax.flow import shift_time


def time_grid(num_steps, factor):
    """The num_steps + 1 shifted times from 1 to 0."""
    return shift_time(jnp.linspace(1.0, 0.0, num_steps + 1), factor)


def euler(velocity_fn, x, times):
    """Euler steps from x at times[0] to times[-1]; one evaluation a step."""

    def step(x, interval):
        t, t_next = interval
        v = velocity_fn(x, jnp.full(x.shape[:1], t))
        return x + (t_next - t) * v, None

    x, _ = jax.lax.scan(step, x, (times[:-1], times[1:]))
    return x
