"""Place, layout and distance for the comparisons with ../shared/data/goldens."""

from pathlib import Path

import jax.numpy as jnp

GOLDENS = Path(__file__).parents[2] / "shared/data/goldens"


def nhwc(x):
    """Return an array [B, C, h, w] as [B, h, w, C]."""
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def relative(a, b):
    """Return the largest difference over the largest value."""
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())
