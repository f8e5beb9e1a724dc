"""Latent statistics: mean and variance of every latent element over the training images, each counted once.

The running moments are this stage's state, so that the generic loop shards, interrupts and resumes it like a training.
"""

import jax.numpy as jnp

from rae_jax import rae


def make(*, autoencoder, latent_shape):
    """Returns (init, step) of this stage. `squares` sums squared distances from the running mean (Chan et al.)."""

    def init(key):
        zeros = jnp.zeros(latent_shape)
        return {"step": jnp.zeros((), jnp.int32), "count": jnp.zeros(()), "mean": zeros, "squares": zeros}

    def step(state, frozen, batch, key):
        latents = autoencoder.encode(frozen["encoder"], rae.to_float(batch["image"]))
        weight = batch["mask"][:, None, None, None]
        count = jnp.maximum(weight.sum(), 1.0)
        mean = (weight * latents).sum(0) / count
        squares = (weight * jnp.square(latents - mean)).sum(0)

        total = state["count"] + count
        delta = mean - state["mean"]
        new = {
            "step": state["step"] + 1,
            "count": total,
            "mean": state["mean"] + delta * (count / total),
            "squares": state["squares"] + squares + jnp.square(delta) * (state["count"] * count / total),
        }
        return new, {"mean": new["mean"].mean(), "variance": (new["squares"] / total).mean()}

    return init, step


def statistics(state):
    """{'mean', 'var'} of shape [h, w, D] from the final state."""
    return {"mean": state["mean"], "var": state["squares"] / state["count"]}
