"""The small encoder's training step, whole, against an oracle that is written from the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_oracles
from conftest import random_like, tiny

from rae_jax.build import models, objectives

BATCH, SIDE, PATCH = 8, 16, 4


def _config():
    """Nothing in it has the value that a mistake would give it."""
    config = tiny()
    config.data.image_size, config.encoder.depth, config.unroll = SIDE, 1, True
    config.encoder.update({"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)})
    config.encoder.train.update({"warmup_steps": 0, "learning_rate": 3e-4, "weight_decay": 0.02, "clip_norm": 0.2})
    config.encoder.train.update({"b1": 0.8, "b2": 0.97, "ema_decay": 0.9})
    config.encoder.train.update({"noise_tau": 0.9, "detail": 2.5, "label_weight": 0.7})
    return config


def _targets(config, images):
    """[B, N, p * p * 3] of images in [0, 1]: normalised, patch by patch, away from each one's mean colour."""
    images = (images - np.asarray(config.encoder.mean)) / np.asarray(config.encoder.std)
    corners = [(i, j) for i in range(0, SIDE, PATCH) for j in range(0, SIDE, PATCH)]
    patches = np.stack([images[:, i : i + PATCH, j : j + PATCH].reshape(BATCH, -1, 3) for i, j in corners], 1)
    colour = patches.mean(2, keepdims=True)
    return np.float32((colour + config.encoder.train.detail * (patches - colour)).reshape(BATCH, len(corners), -1))


def _oracle(config, images, labels, key):
    """Return the function params -> (loss, further metrics), with the random numbers of the step."""
    train, targets = config.encoder.train, _targets(config, images)
    module = models.encoder(config, config.encoder)
    normalised = np.float32((images - np.asarray(config.encoder.mean)) / np.asarray(config.encoder.std))

    def noise(tokens):
        sigma_key, noise_key = jax.random.split(key)
        sigma = train.noise_tau * jax.random.uniform(sigma_key, (BATCH, 1, 1, 1))
        latents = (BATCH, SIDE // PATCH, SIDE // PATCH, config.encoder.width)
        return (sigma * jax.random.normal(noise_key, latents)).reshape(tokens.shape)

    def linear(params, x):
        return jnp.einsum("...i,io->...o", x, params["kernel"]) + params["bias"]

    def loss(params):
        tokens = module.apply({"params": params["encoder"]}, normalised)[-1]
        tokens = (tokens - tokens.mean(-1, keepdims=True)) / jnp.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
        pixels = jnp.abs(linear(params["pixels"], tokens + noise(tokens)) - targets).mean()
        logits = linear(params["classes"], tokens.mean(1))
        of_label = jnp.exp(logits)[jnp.arange(BATCH), labels] / jnp.exp(logits).sum(-1)
        cross_entropy, right = -jnp.log(of_label).mean(), (logits.argmax(-1) == labels).mean()
        found = {"pixels": pixels, "cross_entropy": cross_entropy, "accuracy": right}
        return pixels + train.label_weight * cross_entropy, found

    return loss


def test_a_whole_step_is_the_equations():
    """Each loss, the gradients, their norm, clipping, AdamW's moments and parameters, the average, the count."""
    config, key, rng = _config(), jax.random.key(1), np.random.default_rng(0)
    train = config.encoder.train
    batch = {"image": rng.integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8), "label": np.int32(rng.integers(0, 10, 8))}
    init, step = objectives.init_and_step(config, "encoder")
    shapes = jax.eval_shape(init, jax.random.key(0))
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    state["params"], state["ema_params"] = (random_like(shapes["params"], seed=seed, scale=0.3) for seed in (0, 1))
    new, metrics = jax.jit(step)(state, {}, batch, key)

    loss = _oracle(config, batch["image"] / 255.0, batch["label"], key)
    (value, found), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(state["params"])
    length = step_oracles.norm(grads)
    expected = {**found, "loss": value, "grad_norm": length}
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(jax.tree.map(float, expected), rel=1e-5)
    assert length > train.clip_norm
    clipped = jax.tree.map(lambda g: np.float64(g) * (train.clip_norm / length), grads)
    before, after = ((s["params"], s["opt_state"]) for s in (state, new))
    step_oracles.check_adamw(before, after, clipped, step=1, rate=train.learning_rate, train=train)
    step_oracles.check_average(state["ema_params"], new["params"], new["ema_params"], train.ema_decay)
    assert int(new["step"]) == 1


def test_the_heads_have_the_sizes_of_a_patch_and_of_the_classes():
    config = _config()
    config.data.num_classes = 7
    params = jax.eval_shape(objectives.init_and_step(config, "encoder")[0], jax.random.key(0))["params"]
    assert params["pixels"]["kernel"].shape == (16, PATCH * PATCH * 3)
    assert params["classes"]["kernel"].shape == (16, 7)
