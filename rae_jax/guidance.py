"""Guidance: wrappers that make a velocity_fn out of velocity_fns. All times of a batch must be equal."""

import jax


def guided(strong, weak, *, scale, t_min=0.0, t_max=1.0):
    """weak + scale (strong - weak) while t_min <= t <= t_max, `strong` alone elsewhere.

    With the unconditional velocity as `weak` this is classifier-free guidance (arXiv 2207.12598), with a worse model's
    it is AutoGuidance (arXiv 2406.02507). `weak` is evaluated inside the interval only.
    """

    def velocity_fn(x, t):
        v = strong(x, t)

        def guide(v):
            v_weak = weak(x, t)
            return v_weak + scale * (v - v_weak)

        inside = (t[0] >= t_min) & (t[0] <= t_max)
        return jax.lax.cond(inside, guide, lambda v: v, v)

    return velocity_fn
