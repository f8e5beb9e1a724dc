"""Conditions of a diffusion transformer: pytrees that describe the content of images, and their embeddings."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from rae_jax.models.mesh_matmul import gathered


@dataclasses.dataclass(frozen=True)
class Condition:
    """One kind of condition. The conditions of a batch are a pytree of arrays [B, ...] with the shapes of `spec`."""

    spec: object  # tree of jax.ShapeDtypeStruct: the condition of one image
    null: object  # tree of the same structure: the condition of an image without a condition
    embed: Callable  # width -> module: conditions of a batch -> [B, width], or tokens [B, T, width]

    def zeros(self, batch_size):
        """Return conditions of zeros for a batch, for initialisation and for shapes."""
        return jax.tree.map(lambda spec: jnp.zeros((batch_size, *spec.shape), spec.dtype), self.spec)

    def with_null(self, conditions, rows):
        """Return the conditions with the null condition in the rows that `rows` [B], booleans, marks."""

        def replace(condition, null, spec):
            condition = condition.astype(spec.dtype)  # a small integer type may not hold the null label
            return jnp.where(rows.reshape(-1, *(1,) * (condition.ndim - 1)), null, condition)

        return jax.tree.map(replace, conditions, self.null, self.spec)


def labels(num_classes, *, used=True, tokens=0):
    """Return the condition that is a label of `num_classes` classes. Without `used` all labels mean the null label.

    `tokens`: the number of tokens that a label is embedded in; 0: one vector.
    """
    embed = functools.partial(LabelEmbedding, num_classes if used else 0, tokens=tokens, name="label_embed")
    return Condition(jax.ShapeDtypeStruct((), jnp.int32), num_classes, embed)


class LabelEmbedding(nn.Module):
    """Labels [B] -> [B, width]; the row after the last class is the null label. With 0 classes, every label is null.

    With `tokens` the result is [B, tokens, width]: learned tokens, to each of which the label's row is added.
    """

    num_classes: int
    width: int
    tokens: int = 0

    @nn.compact
    def __call__(self, labels):
        shape = (self.num_classes + 1, self.width)
        table = self.param("table", nn.initializers.normal(0.02), shape, jnp.float32)
        table = gathered(table, "table")
        rows = table[labels if self.num_classes else jnp.zeros_like(labels)]
        if not self.tokens:
            return rows
        tokens = nn.initializers.normal(self.width**-0.5)
        return rows[:, None] + self.param("tokens", tokens, (self.tokens, self.width), jnp.float32)
