"""Solvers of the ODE from noise (t = 1) to data (t = 0); each compiles to one program for the whole trajectory.

`velocity_fn(x, t)` takes x [B, ...] and times t [B]; `times` fall from the first to the last point of the trajectory.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rae_jax.diffusion import flow


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A solver and its times."""

    times: jax.Array  # shifted, from noise to data
    solve: Callable  # (flow.Velocity, x, noise_fn) -> data; noise_fn(n) draws the noise of the n-th step of an SDE


def time_grid(num_steps, factor, *, first=1.0, last=0.0):
    """Return the num_steps + 1 shifted times from `first` to `last`."""
    return flow.shift_time(jnp.linspace(first, last, num_steps + 1, dtype=jnp.float32), factor)


def published_grid(num_points, factor):
    """Return the times of the paper's samples: `num_points` from 1 to the shifted 0.001, for num_points - 1 steps."""
    return flow.shift_time(1.0 - jnp.linspace(0.0, 0.999, num_points, dtype=jnp.float32), factor)


def euler(velocity_fn, x, times):
    """Take Euler steps from x at times[0] to times[-1]; one evaluation per step."""

    def step(x, interval):
        return _euler_step(velocity_fn, x, interval), None

    return _scan(step, x, times)


def euler_points(velocity_fn, x, times):
    """Take Euler steps from x at times[0]; return the points at all times, [len(times), B, ...]."""

    def step(x, interval):
        x = _euler_step(velocity_fn, x, interval)
        return x, x

    points = jax.lax.scan(step, x, (times[:-1], times[1:]))[1]
    return jnp.concatenate([x[None], points])


def _euler_step(velocity_fn, x, interval):
    t, t_next = interval
    return x + (t_next - t) * velocity_fn(x, _all(t, x))


def euler_reusing(velocity, x, times, refresh):
    """Take Euler steps that compute the trunk of a `flow.Velocity` only in the steps that `refresh` [steps] marks.

    The other steps use the trunk's output of the previous step. The first step always computes it.
    """

    def step(carry, interval):
        x, s = carry
        t, t_next, compute = interval
        s = jax.lax.cond(compute, lambda: velocity.trunk(x, _all(t, x)), lambda: s)
        return (x + (t_next - t) * velocity.head(x, _all(t, x), s), s), None

    s = velocity.trunk(x, _all(times[0], x))
    refresh = jnp.asarray(refresh).at[0].set(False)
    (x, _), _ = jax.lax.scan(step, (x, s), (times[:-1], times[1:], refresh))
    return x


def heun(velocity_fn, x, times, *, last_by_euler=False):
    """Take Heun's steps, of order 2: the mean of the velocities at both ends of a step; two evaluations per step.

    `last_by_euler`: the last step takes the velocity at its start alone (as in EDM, arXiv 2206.00364).
    """

    def step(x, interval):
        t, t_next = interval
        v = velocity_fn(x, _all(t, x))
        v_next = velocity_fn(x + (t_next - t) * v, _all(t_next, x))
        return x + 0.5 * (t_next - t) * (v + v_next), None

    if last_by_euler:
        return _euler_step(velocity_fn, _scan(step, x, times[:-1]), times[-2:])
    return _scan(step, x, times)


def jumps(mean_velocity, x, times):
    """Go from x at times[0] to times[-1] by mean velocities, mean_velocity(x, t, r) from t [B] down to r [B]."""

    def step(x, interval):
        t, t_next = interval
        return x + (t_next - t) * mean_velocity(x, _all(t, x), _all(t_next, x)), None

    return _scan(step, x, times)


def adaptive(velocity_fn, x, times, *, rtol, atol):
    """Solve by Dormand and Prince's method of order 5 (diffrax), with ten or more adaptive steps that all images share.

    Only the first and last of `times` matter. Raises ImportError without diffrax, the extra 'adaptive'.
    """
    import diffrax

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, x, _: velocity_fn(x, _all(t, x))),
        diffrax.Dopri5(),
        t0=times[0],
        t1=times[-1],
        dt0=None,
        y0=x,
        # The error estimate fails for steps that are too long: on Gaussian data, a few steps from noise to data were
        # within a tolerance of 1e-3 by the estimate, but their true error was 0.065.
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol, dtmax=(times[0] - times[-1]) / 10),
        max_steps=None,
    )
    return solution.ys[0]


def _scan(step, x, times):
    return jax.lax.scan(step, x, (times[:-1], times[1:]))[0]


def _all(t, x):
    """Return the time t for each image, [B]."""
    return jnp.full(x.shape[:1], t, jnp.float32)
