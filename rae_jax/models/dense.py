"""The linear layer of all models."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from rae_jax.models import mesh_matmul

PRODUCT = "product"  # the name of results that a backward pass with remat='dots' keeps, see layers.scan_blocks


class Dense(nn.Module):
    """Linear layer [B, ..., D] -> [B, ..., features], or a tuple of `parts` equal parts. Products run in `dtype`.

    With remat='dots' a backward pass keeps the result, unless `kept` is False.
    """

    features: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros
    parts: int = 1
    kept: bool = True

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
        name = "/".join((*self.path, "kernel"))
        y, pieces = mesh_matmul.product(x.astype(self.dtype), kernel.astype(self.dtype), name, self.parts)
        # Each part gets its bias after the split: otherwise the bias' gradient would join the parts in memory again.
        biases = jnp.split(bias.astype(self.dtype), self.parts)
        parts = mesh_matmul.split_parts(y, pieces, self.parts)
        found = tuple(part + b for part, b in zip(parts, biases, strict=True))
        if self.kept:
            found = tuple(checkpoint_name(part, PRODUCT) for part in found)
        return found if self.parts > 1 else found[0]
