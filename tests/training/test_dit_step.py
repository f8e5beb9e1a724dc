"""The DiT's training step, whole, against an oracle that is written from the equations, with the step's own draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_oracles
from conftest import random_like, tiny

from rae_jax.build import models, objectives, part_weights
from rae_jax.config import keys as config_keys

BATCH = 16
STEPS = 2  # the second one shows what Adam and the averages remember


@pytest.fixture(scope="module")
def config():
    """Nothing in it has the value that a mistake would give it."""
    config = tiny()
    config.dit.head_depth = 0  # a plain DiT, which compiles faster
    config.dit.train.update({"warmup_steps": 0, "decay_start": 6, "learning_rate": 3e-4, "weight_decay": 0.02})
    config.dit.train.update({"clip_norm": 0.05, "b1": 0.8, "b2": 0.97, "ema_decay": 0.9, "more_ema_decays": (0.6,)})
    config.dit.train.update({"time_mean": 0.4, "time_std": 1.3, "label_dropout": 0.4})
    return config


def _frozen(config):
    """Random weights, and statistics of which some variances are as small as the epsilon."""
    shape, rng = config_keys.latent_shape(config), np.random.default_rng(3)
    variance = np.exp(rng.uniform(np.log(1e-6), np.log(4.0), shape)).astype(np.float32)
    encoder = random_like(part_weights.shapes(config, "encoder"), seed=7, scale=0.3)
    return {"encoder": encoder, "statistics": {"mean": np.float32(rng.normal(size=shape)), "var": variance}}


def _batch(number):
    rng = np.random.default_rng(number)
    return {"image": rng.integers(0, 256, (BATCH, 32, 32, 3), np.uint8), "label": np.int32(rng.integers(0, 10, BATCH))}


def _examples(config, frozen, batch, key):
    """(x_t, t, labels, target) of a batch, by the equations; draws are the step's."""
    train, statistics = config.dit.train, frozen["statistics"]
    z = step_oracles.latents(config, models.autoencoder(config), frozen["encoder"], batch["image"])
    x = (z - np.float64(statistics["mean"])) / np.sqrt(np.float64(statistics["var"]) + 1e-5)
    time_key, noise_key, drop_key = jax.random.split(key, 3)
    highest = (np.log(0.999 / 0.001) - train.time_mean) / train.time_std  # of a logit; the lowest is minus infinity
    logits = train.time_mean + train.time_std * jax.random.truncated_normal(time_key, -np.inf, highest, (BATCH,))
    shift = np.sqrt(np.prod(x.shape[1:]) / 4096)
    t = 1 / (1 + np.exp(-np.float64(logits)))
    t = shift * t / (1 + (shift - 1) * t)
    noise = np.float64(jax.random.normal(noise_key, x.shape))
    labels = np.where(jax.random.bernoulli(drop_key, train.label_dropout, (BATCH,)), 10, batch["label"])
    each = t[:, None, None, None]
    return np.float32((1 - each) * x + each * noise), np.float32(t), labels, np.float32(noise - x)


def test_whole_steps_are_the_equations(config):
    """Loss, gradients, their norm, clipping, AdamW's moments and parameters, both averages, the count of steps."""
    frozen, train, model = _frozen(config), config.dit.train, models.dit(config)
    init, step = objectives.init_and_step(config, "dit")
    run, shapes = jax.jit(step), jax.eval_shape(init, jax.random.key(0))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    for seed, name in enumerate(("params", "ema_params", "more_ema_params")):
        state[name] = random_like(shapes[name], seed=seed, scale=0.3)

    @jax.jit
    def gradient(params, x_t, t, labels, target):
        return jax.value_and_grad(lambda p: jnp.square(model.apply({"params": p}, x_t, t, labels) - target).mean())(
            params
        )

    dropped = 0
    for number in range(1, STEPS + 1):
        batch, key = _batch(number), jax.random.key(number)
        examples = _examples(config, frozen, batch, key)
        dropped += (examples[2] == 10).sum()
        loss, grads = gradient(state["params"], *examples)
        new, metrics = run(state, frozen, batch, key)
        assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
        length = step_oracles.norm(grads)
        assert length > train.clip_norm and float(metrics["grad_norm"]) == pytest.approx(length, rel=1e-5)
        clipped = jax.tree.map(lambda g, s=train.clip_norm / length: np.float64(g) * s, grads)
        before, after = ((s["params"], s["opt_state"]) for s in (state, new))
        step_oracles.check_adamw(before, after, clipped, step=number, rate=train.learning_rate, train=train)
        step_oracles.check_average(state["ema_params"], new["params"], new["ema_params"], 0.9)
        step_oracles.check_average(state["more_ema_params"][0], new["params"], new["more_ema_params"][0], 0.6)
        assert int(new["step"]) == number
        state = new
    assert 0 < dropped < STEPS * BATCH
