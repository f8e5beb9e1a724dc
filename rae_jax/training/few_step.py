"""After stage 2: a student learns mean velocities, by which one step goes from noise to data.

u(z, r, t) is the mean over the times from r to t of the velocity on the trajectory through z at t. It obeys
u = v - (t - r) du/dt, with the derivative along the trajectory (MeanFlow, arXiv 2505.13447; MF-RAE, arXiv 2511.13019).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rae_jax.diffusion import flow, ode
from rae_jax.training import dit, optim

_SCALE = 1e-3  # of `balanced`


class Times(NamedTuple):
    """The distribution of the pairs of times r <= t."""

    shift_factor: float
    equal: float  # fraction of the images with r = t, whose target is the velocity itself

    def __call__(self, key, batch_size):
        """Return (r, t), each [B]: two uniform times, shifted towards noise."""
        times_key, equal_key = jax.random.split(key)
        pair = flow.shift_time(jax.random.uniform(times_key, (2, batch_size)), self.shift_factor)
        r, t = pair.min(0), pair.max(0)
        return jnp.where(jax.random.bernoulli(equal_key, jnp.float32(self.equal), t.shape), t, r), t


def by_differences(function, z, t, v, size):
    """Return the derivative of function(z, t) along (v, 1), by central differences of a `size` in time."""
    step = size * v
    with jax.default_matmul_precision("highest"):  # a TPU would round float32 to bfloat16, by more than the difference
        return (function(z + step, t + size) - function(z - step, t - size)) / (2.0 * size)


def by_jvp(function, z, t, v):
    """Return the derivative of function(z, t) along (v, 1), exactly."""
    return jax.jvp(function, (z, t), (v, jnp.ones_like(t)))[1]


def target(mean_velocity, z, r, t, v, derivative):
    """Return v - (t - r) du/dt, without a gradient. mean_velocity(z, r, t) -> u."""
    change = derivative(lambda z, t: mean_velocity(z, r, t), z, t, v)
    return jax.lax.stop_gradient(v - _of_images(t - r, z) * change)


def balanced(error, power):
    """Return L^2 / (L^2 + 1e-3)^((1 + power) / 2) with a constant divisor, for the sum of squares L of each image [B].

    The gradient of L is divided by about L^power. 0: every image by its square error; 0.5: gradients of about the same
    size; 1, as published: the smaller the error, the larger the gradient. Source: MeanFlow (arXiv 2505.13447).
    """
    return jnp.square(error) / (jnp.square(jax.lax.stop_gradient(error)) + _SCALE) ** ((1.0 + power) / 2.0)


class Identity(NamedTuple):
    """The objective that u = v - (t - r) du/dt holds at points between data and noise (MeanFlow, MF-RAE).

    `velocity(frozen, x, noise, z, t, condition)` is the velocity at z: a teacher's, or that of data and noise. `path`:
    a flow.Path. `times`: Times. `derivative(function, z, t, v)`: by_jvp, or by_differences of a size. `balance`: the
    power of `balanced`.
    """

    autoencoder: Any
    velocity: Callable
    path: flow.Path
    times: Times
    derivative: Callable
    balance: float

    def examples(self, frozen, batch, condition, keys):
        """Return points between the batch's latents and noise, their two times, and the velocity there."""
        times_key, noise_key = keys
        x = dit.latents(self.autoencoder, frozen, batch)
        r, t = self.times(times_key, len(x))
        noise = jax.random.normal(noise_key, x.shape, jnp.float32)
        z = flow.interpolate(x, noise, t, self.path)
        v = self.velocity(frozen, x, noise, z, t, condition)
        return {"z": z, "r": r, "t": t, "v": v, "condition": condition}

    def loss(self, u, params, examples):
        """Return (loss, metrics) of u(params, z, r, t)."""
        z, r, t, v = (examples[name] for name in ("z", "r", "t", "v"))
        fixed = functools.partial(u, jax.lax.stop_gradient(params))
        errors = jnp.square(u(params, z, r, t) - target(fixed, z, r, t, v, self.derivative))
        return balanced(errors.sum((1, 2, 3)), self.balance).mean(), {"mean_square": errors.mean()}


class Trajectories(NamedTuple):
    """The objective that u goes from one point of the teacher's trajectory to a later one (consistency mid-training).

    `velocity`: as in Identity, of a teacher. `times` [N]: of the trajectory's points, from noise to data. `pairs`:
    number of pairs of points of each trajectory. The student is told even times from 1 to 0, whatever `times` are, as
    published. Source: CMT, as MF-RAE uses it (arXiv 2511.13019).
    """

    velocity: Callable
    times: jax.Array
    pairs: int
    latent_shape: tuple

    def examples(self, frozen, batch, condition, keys):
        """Return points of the teacher's trajectories from noise, with the mean velocities to later points."""
        pairs_key, noise_key = keys
        size = len(batch["label"])
        noise = jax.random.normal(noise_key, (size, *self.latent_shape), jnp.float32)
        points = ode.euler_points(lambda z, t: self.velocity(frozen, None, noise, z, t, condition), noise, self.times)
        points = jnp.moveaxis(points, 0, 1)  # [B, N, h, w, D]
        ends = jnp.stack(jnp.triu_indices(len(self.times), 1))  # [2, N (N - 1) / 2]: a point, and one nearer to data
        i, j = ends[:, jax.random.randint(pairs_key, (size, self.pairs), 0, ends.shape[1])]
        told = jnp.linspace(1.0, 0.0, len(self.times))
        t, r = told[i], told[j]
        z, later = (jax.vmap(lambda of, at: of[at])(points, index) for index in (i, j))
        pairs = {"z": z, "r": r, "t": t, "u": (z - later) / _of_images(t - r, z)}
        pairs["condition"] = jax.tree.map(lambda a: jnp.repeat(a[:, None], self.pairs, 1), condition)
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), pairs)

    def loss(self, u, params, examples):
        """Return (loss, metrics) of u(params, z, r, t)."""
        error = jnp.square(u(params, *(examples[name] for name in ("z", "r", "t"))) - examples["u"]).mean()
        return error, {"mean_square": error}


def make(
    *,
    student,
    mean_velocity,
    objective,
    condition,
    latent_shape,
    optimiser,
    ema_decay,
    condition_dropout,
    microbatches,
):
    """Return (init, step) of this stage; the student's initial parameters are random.

    `mean_velocity(params, z, r, t, condition)` is u of the student. `objective`: Identity or Trajectories. A batch is
    as in training.dit, and so is the rest.
    """

    def init(key):
        x, t = jnp.zeros((1, *latent_shape), jnp.float32), jnp.ones(1, jnp.float32)
        return optim.init_state(student.init(key, x, t, condition.zeros(1), r=t)["params"], optimiser)

    def loss(params, examples):
        def u(params, z, r, t):
            return mean_velocity(params, z, r, t, examples["condition"])

        return objective.loss(u, params, examples)

    def step(state, frozen, batch, key):
        *keys, drop_key = jax.random.split(key, 3)
        conditions = dit.dropped(condition, drop_key, condition_dropout, batch["label"])
        examples = objective.examples(frozen, batch, conditions, keys)
        (value, metrics), grads = optim.value_and_grad(loss, state["params"], examples, microbatches)
        state, grad_norm = optim.update(state, grads, optimiser, ema_decay)
        return state, {"loss": value, **metrics, "grad_norm": grad_norm}

    return init, step


def _of_images(values, x):
    """Return values [B] in a shape that multiplies x [B, ...]."""
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))
