"""Latent statistics: mean and variance of every latent element over the training images, each counted once.

The running moments are this stage's state: the training loop shards, interrupts and resumes it like any other stage.
"""

import jax.numpy as jnp

from rae_jax.models.autoencoder import to_float


def make(*, autoencoder, latent_shape):
    """Return (init, step) of this stage. `squares` sums squared distances from the running mean (Chan et al.).

    Mean and squares are each a sum of two float32 numbers. The second number, `mean_low` or `squares_low`, is the
    rounding error of the first: thousands of small batches lose no digits.
    """

    def init(key):
        zeros = jnp.zeros(latent_shape, jnp.float32)
        moments = dict.fromkeys(("mean", "mean_low", "squares", "squares_low"), zeros)
        return {"step": jnp.zeros((), jnp.int32), "count": jnp.zeros((), jnp.int32), **moments}

    def step(state, frozen, batch, key):
        latents = autoencoder.encode(frozen["encoder"], to_float(batch["image"]))
        weight = batch["mask"][:, None, None, None]
        new_count = jnp.round(batch["mask"].sum()).astype(jnp.int32)
        total = state["count"] + new_count
        share = new_count / jnp.maximum(total, 1)  # 0 images so far, if none of the first batches could be read

        centred = latents - state["mean"]
        shift = (weight * centred).sum(0) / jnp.maximum(new_count, 1)  # the batch's mean minus the running mean
        squares = (weight * jnp.square(centred - shift)).sum(0)
        shift = shift - state["mean_low"]
        between = jnp.square(shift) * (state["count"] * share)
        mean, mean_low = _add(state["mean"], state["mean_low"], shift * share)
        total_squares, squares_low = _add(state["squares"], state["squares_low"], squares + between)
        moments = {"mean": mean, "mean_low": mean_low, "squares": total_squares, "squares_low": squares_low}
        new = {"step": state["step"] + 1, "count": total, **moments}
        return new, {"mean": mean.mean(), "variance": (total_squares / jnp.maximum(total, 1)).mean()}

    return init, step


def statistics(state):
    """Return {'mean', 'var'} of shape [h, w, D] from the final state."""
    return {
        "mean": state["mean"] + state["mean_low"],
        "var": (state["squares"] + state["squares_low"]) / state["count"],
    }


def _add(high, low, x):
    """Return (high + low) + x as a pair (high, low). Source: Knuth's exact sum of two numbers, then Dekker's."""
    total = high + x
    added = total - high
    low = low + ((high - (total - added)) + (x - added))
    high = total + low
    return high, low - (high - total)
