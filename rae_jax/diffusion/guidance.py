"""Guidance: one velocity from a strong and a weak velocity.

The velocity is weak + scale (strong - weak) while t_min <= t <= t_max. At other times it is the strong velocity alone,
and the weak velocity is not computed if all times of a batch are equal. If the weak velocity is unconditional, this is
classifier-free guidance (arXiv 2207.12598); if it comes from a worse model, this is AutoGuidance (arXiv 2406.02507).
"""

import dataclasses

import jax
import jax.numpy as jnp

from rae_jax.diffusion.flow import Velocity, undivided


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The scale of guidance, a number or a traced scalar, and the interval of times in which it acts."""

    scale: float | jax.Array
    t_min: float = 0.0
    t_max: float = 1.0
    same_time: bool = True  # all times of a batch are equal, as in sampling

    def __call__(self, strong, weak):
        """Return the guided `Velocity` of a strong and a weak `Velocity`.

        Outside the interval the weak trunk's output is zeros: it must be computed again at the start of the interval.
        """
        if not self.same_time:
            return undivided(lambda x, t: self.mix(strong(x, t), weak(x, t), t))

        def trunk(x, t):
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(weak.trunk, x, t))
            return strong.trunk(x, t), jax.lax.cond(self._acts(t[0]), lambda: weak.trunk(x, t), lambda: zeros)

        def head(x, t, outputs):
            s, s_weak = outputs
            v = strong.head(x, t, s)
            return jax.lax.cond(self._acts(t[0]), lambda: self._mix(v, weak.head(x, t, s_weak)), lambda: v)

        return Velocity(trunk, head)

    def mix(self, v, v_weak, t):
        """Return the guided velocity at times t of two velocities that are both there."""
        acts = self._acts(t).reshape(t.shape + (1,) * (v.ndim - t.ndim))
        return jnp.where(acts, self._mix(v, v_weak), v)

    def _acts(self, t):
        return (t >= self.t_min) & (t <= self.t_max)

    def _mix(self, v, v_weak):
        return v_weak + self.scale * (v - v_weak)
