"""Guidance: one velocity made of a strong and a weak one. All times of a batch must be equal.

weak + scale (strong - weak) while t_min <= t <= t_max, and the strong one alone elsewhere, where the weak one is not
evaluated. With the unconditional velocity as the weak one this is classifier-free guidance (arXiv 2207.12598), with a
worse model's it is AutoGuidance (arXiv 2406.02507).
"""

import jax
import jax.numpy as jnp


def guided(strong, weak, *, scale, t_min=0.0, t_max=1.0):
    """velocity_fn(x, t) of two such functions."""

    def velocity_fn(x, t):
        v = strong(x, t)
        return jax.lax.cond(_inside(t, t_min, t_max), lambda: _mix(v, weak(x, t), scale), lambda: v)

    return velocity_fn


def guided_halves(strong, weak, *, scale, t_min=0.0, t_max=1.0):
    """(condition_fn, velocity_fn) of two such pairs: condition_fn(x, t) -> s, velocity_fn(x, t, s) -> velocity.

    Outside the interval the weak condition is zeros, so that it must be made anew where the interval begins.
    """

    def condition_fn(x, t):
        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(weak[0], x, t))
        return strong[0](x, t), jax.lax.cond(_inside(t, t_min, t_max), lambda: weak[0](x, t), lambda: nothing)

    def velocity_fn(x, t, conditions):
        s, s_weak = conditions
        return guided(
            lambda x, t: strong[1](x, t, s), lambda x, t: weak[1](x, t, s_weak), scale=scale, t_min=t_min, t_max=t_max
        )(x, t)

    return condition_fn, velocity_fn


def _inside(t, t_min, t_max):
    return (t[0] >= t_min) & (t[0] <= t_max)


def _mix(v, v_weak, scale):
    return v_weak + scale * (v - v_weak)
