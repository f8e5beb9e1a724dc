"""A small convolutional classifier: the judge of generated images."""

import jax
import jax.numpy as jnp
from flax import linen as nn


class ConvNet(nn.Module):
    """Images [B, H, W, 3] in [0, 1] -> logits [B, num_classes]."""

    widths: tuple
    num_classes: int

    @nn.compact
    def __call__(self, images):
        x = images * 2.0 - 1.0
        for i, width in enumerate(self.widths):
            x = nn.Conv(width, (3, 3), strides=1 if i == 0 else 2, name=f"conv{i}")(x)
            x = nn.relu(nn.GroupNorm(num_groups=8, name=f"norm{i}")(x))
        # The gradient of a maximum goes to the values that equal the maximum, divided by their number. If XLA computes
        # x twice with different rounding, no value equals it, and 0 / 0 is NaN (on CPU with jax 0.12, optimisation
        # level 0).
        x = jax.lax.optimization_barrier(x)
        return nn.Dense(self.num_classes, name="classes")(jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], -1))
