"""From config to flow: where the names of paths, predictions, times, samplers and guidance are matched."""

import functools

import jax
import numpy as np

from rae_jax.config.keys import latent_shape
from rae_jax.diffusion import flow, guidance, ode, sde


def path(config):
    """The path between data and noise that the DiT was trained on."""
    match config.dit.path:
        case "linear":
            return flow.LINEAR
        case "cosine":
            return flow.COSINE
        case "vp":
            return flow.VP
        case other:
            raise ValueError(f"unknown path {other!r}")


def to_velocity(config):
    """Function (model output, x_t, t) -> velocity."""
    match config.dit.prediction:
        case "velocity":
            return lambda output, x_t, t: output
        case "noise":
            return functools.partial(flow.velocity_from_noise, path=path(config))
        case "data":
            return functools.partial(flow.velocity_from_data, path=path(config))
        case other:
            raise ValueError(f"unknown prediction {other!r}")


def target_fn(config):
    """Function (x, noise, t) -> what the model is to predict."""
    match config.dit.prediction:
        case "velocity":
            return functools.partial(flow.velocity, path=path(config))
        case "noise":
            return lambda x, noise, t: noise
        case "data":
            return lambda x, noise, t: x
        case other:
            raise ValueError(f"unknown prediction {other!r}")


def shift_factor(config):
    """The factor by which times are shifted, in training and in sampling: the config's, or the latent's own."""
    return config.dit.time_shift or flow.shift_factor(latent_shape(config))


def time_fn(config):
    """Function (key, batch_size) -> unshifted training times, kept where the published ones are: within [0, 0.999]."""
    train = config.dit.train
    low, high = (0.0, 0.999) if ends(config) == (1.0, 0.0) else (0.001, 0.999)
    match train.time:
        case "logit_normal":
            return functools.partial(
                flow.logit_normal_time, mean=train.time_mean, std=train.time_std, low=low, high=high
            )
        case "uniform":
            return functools.partial(flow.uniform_time, low=low, high=high)
        case other:
            raise ValueError(f"unknown distribution of times {other!r}")


def times(config, factor):
    """The sampler's shifted times. Off the ends where something is not defined there."""
    c = config.sampler
    first, last = ends(config)
    if c.method == "sde":
        if c.diffusion == "score_based":
            first = min(first, 0.999)  # it is infinite at 1
        last = last if c.last_step == "none" else c.last_step_size
    match c.grid:
        case "plain":
            return ode.time_grid(c.num_steps, factor, first=first, last=last)
        case "published":
            return ode.published_grid(c.num_steps, factor)
        case other:
            raise ValueError(f"unknown grid {other!r}")


def ends(config):
    """The first and last unshifted time at which the velocity is asked for."""
    whole = config.dit.prediction == "velocity" and config.dit.path != "vp"
    return (1.0, 0.0) if whole else (0.999, 0.001)


def guided(config, strong, weak, scale=None):
    """(condition_fn, velocity_fn) with the config's guidance, of such pairs; `weak` may be None without guidance.

    `scale`, a number or an array, takes the place of the config's.
    """
    g = config.guidance
    if g.method == "none":
        return strong
    scale = g.scale if scale is None else scale
    return guidance.guided_halves(strong, weak, scale=scale, t_min=g.t_min, t_max=g.t_max)


def solve(config, halves, x, times, noise_fn):
    """The config's sampler from x, which is noise, to data. `noise_fn(n)`: noise of the n-th step of an SDE."""
    c = config.sampler
    condition_fn, rest = halves

    def velocity_fn(x, t):
        return rest(x, t, condition_fn(x, t))

    match c.method:
        case "euler":
            if c.reuse == 1 and not c.refresh:
                return ode.euler(velocity_fn, x, times)
            return ode.euler_reusing(condition_fn, rest, x, times, refreshed(config, times))
        case "heun":
            return ode.heun(velocity_fn, x, times)
        case "adaptive":
            return ode.adaptive(velocity_fn, x, times, rtol=c.rtol, atol=c.atol)
        case "sde":
            return _sde(config, velocity_fn, x, times, noise_fn)
        case other:
            raise ValueError(f"unknown sampler {other!r}")


def refreshed(config, times):
    """Which steps make the trunk's output anew: every `reuse`-th, or those of `refresh`.

    In either case the first inside the guidance interval does, too.
    """
    with jax.ensure_compile_time_eval():
        starts = np.asarray(times)[:-1]
    inside = (starts >= config.guidance.t_min) & (starts <= config.guidance.t_max)
    enters = inside & ~np.concatenate([[False], inside[:-1]])
    steps, c = np.arange(len(starts)), config.sampler
    chosen = np.isin(steps, c.refresh) if c.refresh else steps % c.reuse == 0
    return chosen | enters


def _sde(config, velocity_fn, x, times, noise_fn):
    c = config.sampler
    along, diffusion_fn = path(config), _diffusion(c.diffusion)
    x = sde.euler_maruyama(velocity_fn, x, times, noise_fn=noise_fn, diffusion_fn=diffusion_fn, path=along)
    match c.last_step:
        case "none":
            return x
        case "mean":
            return sde.mean_step(velocity_fn, x, times[-1], diffusion_fn=diffusion_fn, path=along)
        case "tweedie":
            return sde.tweedie_step(velocity_fn, x, times[-1], path=along)
        case "euler":
            return sde.euler_step(velocity_fn, x, times[-1])
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
