"""Guidance: one velocity from a strong and a weak velocity. All times of a batch must be equal.

The velocity is weak + scale (strong - weak) while t_min <= t <= t_max. At other times it is the strong velocity alone,
and the weak velocity is not computed. If the weak velocity is unconditional, this is classifier-free guidance
(arXiv 2207.12598); if it comes from a worse model, this is AutoGuidance (arXiv 2406.02507).
"""

import dataclasses

import jax
import jax.numpy as jnp

from rae_jax.diffusion.flow import Velocity


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The scale of guidance, a number or a traced scalar, and the interval of times in which it acts."""

    scale: float | jax.Array
    t_min: float = 0.0
    t_max: float = 1.0

    def __call__(self, strong, weak):
        """Return the guided `Velocity` of a strong and a weak `Velocity`.

        Outside the interval the weak trunk's output is zeros: it must be computed again at the start of the interval.
        """

        def trunk(x, t):
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(weak.trunk, x, t))
            return strong.trunk(x, t), jax.lax.cond(self._acts(t), lambda: weak.trunk(x, t), lambda: zeros)

        def head(x, t, outputs):
            s, s_weak = outputs
            v = strong.head(x, t, s)
            return jax.lax.cond(self._acts(t), lambda: self._mix(v, weak.head(x, t, s_weak)), lambda: v)

        return Velocity(trunk, head)

    def mix(self, v, v_weak, t):
        """Return the guided velocity at times t of two velocities that are both there."""
        return jnp.where(self._acts(t), self._mix(v, v_weak), v)

    def _acts(self, t):
        return (t[0] >= self.t_min) & (t[0] <= self.t_max)

    def _mix(self, v, v_weak):
        return v_weak + self.scale * (v - v_weak)
