"""Construction of prediction, sampler and guidance from the config."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax.build import models
from rae_jax.config.keys import generator, latent_shape
from rae_jax.diffusion import flow, ode, sde
from rae_jax.diffusion.flow import Prediction, Velocity
from rae_jax.diffusion.guidance import Guidance
from rae_jax.models.dit import in_dtype


def prediction(config):
    """Return the `Prediction` of config.dit."""
    path = _path(config.dit.path)
    match config.dit.prediction:
        case "velocity":
            target, to_velocity = functools.partial(flow.velocity, path=path), lambda output, x_t, t: output
        case "noise":
            target = lambda x, noise, t: noise  # noqa: E731
            to_velocity = functools.partial(flow.velocity_from_noise, path=path)
        case "data":
            target = lambda x, noise, t: x  # noqa: E731
            to_velocity = functools.partial(flow.velocity_from_data, path=path)
        case "data_in_velocity":
            target = lambda x, noise, t: x  # noqa: E731
            return Prediction(path, target, flow.clamped_velocity, 1.0, 0.0, 1.0, flow.clamped_weight, True)
        case other:
            raise ValueError(f"unknown prediction {other!r}")
    defined_at_ends = config.dit.prediction == "velocity" and config.dit.path != "vp"
    first, last = (1.0, 0.0) if defined_at_ends else (0.999, 0.001)
    return Prediction(path, target, to_velocity, first, last, steep_at_data=config.dit.prediction == "data")


def _path(name):
    match name:
        case "linear":
            return flow.LINEAR
        case "cosine":
            return flow.COSINE
        case "vp":
            return flow.VP
        case other:
            raise ValueError(f"unknown path {other!r}")


def shift_factor(config):
    """Return the factor that shifts times of training and sampling: config.dit.time_shift, or the latent's default."""
    return config.dit.time_shift or flow.shift_factor(latent_shape(config))


def time_fn(config):
    """Return the function (key, batch_size) -> training times before the shift, between those of the Prediction."""
    train, p = config.dit.train, prediction(config)
    low, high = p.last, p.latest
    match train.time:
        case "logit_normal":
            return functools.partial(
                flow.logit_normal_time, mean=train.time_mean, std=train.time_std, low=low, high=high
            )
        case "uniform":
            return functools.partial(flow.uniform_time, low=low, high=high)
        case other:
            raise ValueError(f"unknown distribution of times {other!r}")


def sampler(config):
    """Return the `ode.Sampler` of config.sampler."""
    times = _times(config)
    return ode.Sampler(times, functools.partial(_solve, config, times))


def _times(config):
    """Return the shifted times, without an end at which the velocity or the diffusion is not defined.

    They are concrete numbers, also inside jit.
    """
    c, p, factor = config.sampler, prediction(config), shift_factor(config)
    first, last = p.first, p.last
    if c.method == "sde":
        if c.diffusion == "score_based":
            first = min(first, 0.999)  # the diffusion is infinite at 1
        last = last if c.last_step == "none" else c.last_step_size
    with jax.ensure_compile_time_eval():
        if c.method == "mean_velocity":
            return ode.time_grid(c.num_steps, 1.0)
        match c.grid:
            case "plain":
                return ode.time_grid(c.num_steps, factor, first=first, last=last)
            case "published":
                return ode.published_grid(c.num_steps, factor)
            case other:
                raise ValueError(f"unknown grid {other!r}")


def times_of_trajectory(config, num_points):
    """Return `num_points` shifted times from noise to data, without an end at which the velocity is not defined."""
    p = prediction(config)
    with jax.ensure_compile_time_eval():
        return ode.time_grid(num_points - 1, shift_factor(config), first=p.first, last=p.last)


def _solve(config, times, velocity, x, noise_fn):
    c = config.sampler
    match c.method:
        case "euler":
            if c.reuse == 1 and not c.refresh:
                return ode.euler(velocity, x, times)
            return ode.euler_reusing(velocity, x, times, refreshed(config))
        case "heun":
            return ode.heun(velocity, x, times, last_by_euler=prediction(config).steep_at_data)
        case "adaptive":
            return ode.adaptive(velocity, x, times, rtol=c.rtol, atol=c.atol)
        case "sde":
            return _solve_sde(config, times, velocity, x, noise_fn)
        case "mean_velocity":
            return ode.jumps(velocity, x, times)
        case other:
            raise ValueError(f"unknown sampler {other!r}")


def refreshed(config):
    """Return which steps compute the trunk again, [steps]: every `reuse`-th step, or the steps of `refresh`.

    The first step inside the guidance interval always computes it.
    """
    c = config.sampler
    starts = np.asarray(_times(config))[:-1]
    inside = (starts >= config.guidance.t_min) & (starts <= config.guidance.t_max)
    enters = inside & ~np.concatenate([[False], inside[:-1]])
    steps = np.arange(len(starts))
    chosen = np.isin(steps, c.refresh) if c.refresh else steps % c.reuse == 0
    return chosen | enters


def _solve_sde(config, times, velocity, x, noise_fn):
    c, path = config.sampler, prediction(config).path
    diffusion_fn = _diffusion(c.diffusion)
    x = sde.euler_maruyama(velocity, x, times, noise_fn=noise_fn, diffusion_fn=diffusion_fn, path=path)
    match c.last_step:
        case "none":
            return x
        case "mean":
            return sde.mean_step(velocity, x, times[-1], diffusion_fn=diffusion_fn, path=path)
        case "tweedie":
            return sde.tweedie_step(velocity, x, times[-1], path=path)
        case "euler":
            return sde.euler_step(velocity, x, times[-1])
        case other:
            raise ValueError(f"unknown last step {other!r}")


def _diffusion(name):
    match name:
        case "constant":
            return sde.constant
        case "score_based":
            return sde.score_based
        case "sigma":
            return sde.sigma
        case "linear":
            return sde.linear
        case "decreasing":
            return sde.decreasing
        case "increasing_decreasing":
            return sde.increasing_decreasing
        case other:
            raise ValueError(f"unknown diffusion coefficient {other!r}")


def is_guided(config):
    """Return whether the config's sampler uses guidance."""
    return config.guidance.method != "none" and generator(config) == "dit"


def has_fixed_steps(config):
    """Return whether the number of the sampler's steps is known before it runs."""
    return config.sampler.method != "adaptive"


def velocity(config, parts, labels, scale=None, *, same_time=True):
    """Return the `Velocity` of the DiT for these labels [B], with the config's guidance.

    `parts` holds the parameters 'dit', and 'guide' for AutoGuidance. `scale` replaces the scale of config.guidance.
    `same_time`: all times of a batch will be equal.
    """
    g, strong = config.guidance, _of_model(config, config.dit, parts["dit"], labels)
    outer = Guidance(g.scale if scale is None else scale, g.t_min, g.t_max, same_time)
    match g.method:
        case "none":
            return strong
        case "cfg":
            return outer(strong, _of_model(config, config.dit, parts["dit"], _null(config, labels)))
        case "autoguidance":
            return outer(strong, _of_model(config, g.dit, parts["guide"], labels))
        case "internal":
            return _internal(config, parts["dit"], labels, outer)
        case "internal_cfg":
            inner = Guidance(g.internal.scale, g.internal.t_min, g.internal.t_max, same_time)
            return outer(*(_internal(config, parts["dit"], of, inner) for of in (labels, _null(config, labels))))
        case other:
            raise ValueError(f"unknown guidance {other!r}")


def mean_velocity(config, params, labels):
    """Return the function (x, t, r) -> mean velocity [B, h, w, D] from t down to r, of the few-step student."""
    student, to_velocity = models.dit(config, mean_velocity=True), prediction(config).to_velocity

    def u(x, t, r):
        return to_velocity(student.apply({"params": params}, x, t, labels, r=r), x, t)

    return u


def velocity_of_generator(config, parts, labels, scale=None):
    """Return what the config's sampler solves with: the `Velocity` of the DiT, or the student's mean velocity."""
    if generator(config) == "dit":
        return velocity(config, parts, labels, scale)
    return mean_velocity(config, in_dtype(parts["few_step"], config.dtype), labels)


def _null(config, labels):
    return jnp.full_like(labels, models.condition(config).null)


def _of_model(config, sizes, params, labels):
    """Return the `Velocity` of a DiT of these sizes; without a wide head, its trunk is empty."""
    dit, to_velocity = models.dit(config, sizes), prediction(config).to_velocity
    params = {"params": in_dtype(params, config.dtype)}
    if sizes.head_depth == 0:
        return flow.undivided(lambda x, t: to_velocity(dit.apply(params, x, t, labels), x, t))

    def trunk(x, t):
        return dit.apply(params, x, t, labels, method="trunk")

    def head(x, t, s):
        return to_velocity(dit.apply(params, x, t, s, method="head"), x, t)

    return Velocity(trunk, head)


def _internal(config, params, labels, guidance):
    """Return the `Velocity` of the config's DiT, guided by its own base output: one forward pass for both."""
    dit, to_velocity = models.dit(config), prediction(config).to_velocity
    params = {"params": in_dtype(params, config.dtype)}

    def trunk(x, t):
        return dit.apply(params, x, t, labels, method="trunk_and_base")

    def head(x, t, outputs):
        s, base = outputs
        v, weak = (to_velocity(y, x, t) for y in (dit.apply(params, x, t, s, method="head"), base))
        return guidance.mix(v, weak, t)

    return Velocity(trunk, head)
