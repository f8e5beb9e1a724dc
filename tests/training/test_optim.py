"""Gradients of batches in parts, and averages of parameters, against their definitions."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rae_jax.training import optim


@pytest.mark.parametrize("microbatches", [1, 4])
def test_microbatches_are_the_whole_batch(microbatches):
    """The loss, the mean of (x w)^2; its gradient; and a further metric, also a mean over the examples."""
    x, w = np.random.default_rng(0).normal(size=(8, 3)), np.random.default_rng(1).normal(size=3)

    def loss(w, x):
        y = x @ w
        return jnp.square(y).mean(), {"absolute": jnp.abs(y).mean()}

    (found, metrics), gradient = optim.value_and_grad(loss, jnp.float32(w), jnp.float32(x), microbatches)
    np.testing.assert_allclose(found, np.square(x @ w).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["absolute"], np.abs(x @ w).mean(), rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * (x @ w) @ x / 8, rtol=1e-5)


def test_each_average_has_its_own_decay():
    optimiser = optax.sgd(0.3)
    state = optim.init_state({"w": jnp.ones(3)}, optimiser, more_averages=2)
    params, averages = np.ones(3), [np.ones(3) for _ in range(3)]
    decays = (0.9, 0.5, 0.0)
    for n in range(4):
        grads = np.full(3, n + 1.0)
        state, _ = optim.update(state, {"w": jnp.asarray(grads)}, optimiser, decays[0], decays[1:])
        params = params - 0.3 * grads
        averages = [decay * average + (1 - decay) * params for decay, average in zip(decays, averages, strict=True)]
    found = [state["ema_params"], *state["more_ema_params"]]
    for ours, theirs in zip(found, averages, strict=True):
        np.testing.assert_allclose(ours["w"], theirs, rtol=1e-6)
