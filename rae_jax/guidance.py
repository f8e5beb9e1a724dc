"""Guidance: wrappers that make a velocity_fn out of velocity_fns."""

import jax


def classifier_free(conditional, unconditional, *, scale, t_min=0.0, t_max=1.0):
    """v_null + scale (v - v_null) while t_min <= t <= t_max, plain v elsewhere.

    The unconditional velocity is evaluated inside the interval only. All times of a batch must be equal.
    """

    def velocity_fn(x, t):
        v = conditional(x, t)

        def guided(v):
            v_null = unconditional(x, t)
            return v_null + scale * (v - v_null)

        inside = (t[0] >= t_min) & (t[0] <= t_max)
        return jax.lax.cond(inside, guided, lambda v: v, v)

    return velocity_fn
