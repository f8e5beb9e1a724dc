"""Train a small KL autoencoder with the project's loop, and write folders for config.{encoder,decoder}.weights.

It is the baseline of one experiment: Stable Diffusion's modules with few channels, an L1 loss, the KL divergence of the
posterior from N(0, 1), and no adversarial loss.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rae_jax.build import data as build_data
from rae_jax.build import models
from rae_jax.build import optimiser as build_optimiser
from rae_jax.data import pipeline
from rae_jax.models.autoencoder import to_float
from rae_jax.runtime import checkpoint_reader, sharding
from rae_jax.training import optim
from rae_jax.training.loop import Stage, fit
from rae_jax.weights import safetensors_tree


def train(config, workdir, mesh, *, num_steps, batch_size, learning_rate, kl_weight):
    """Train the VAE of the config in `workdir`, or resume it, and write WORKDIR/weights."""
    settings = {"num_steps": num_steps, "batch_size": batch_size, "learning_rate": learning_rate, "optimizer": "adamw"}
    settings |= {"final_learning_rate": learning_rate / 100, "clip_norm": 1.0}
    train_config = ConfigDict({**config.decoder.train, **settings})
    init, step = make(models.autoencoder(config), config.data.image_size, train_config, kl_weight)
    reading = {key: config.data[key] for key in ("num_threads", "num_workers", "on_error")}
    batches = pipeline.training_batches(
        build_data.source(config, "train"),
        batch_size=batch_size,
        seed=config.seed,
        random_crop=False,
        flip=False,
        **reading,
    )
    stage = Stage("vae", init, step, {}, batches, batch_size, num_steps)
    saving = {"log_every": config.log_every, "checkpoint_every": config.checkpoint.every, "keep": 1}
    fit(stage, workdir=workdir, mesh=mesh, key=jax.random.key(config.seed), **saving)
    params = trained(stage, workdir, mesh)
    for part in ("encoder", "decoder"):
        safetensors_tree.write(workdir / "weights" / f"{part}.safetensors", params[part])


def make(autoencoder, image_size, train_config, kl_weight):
    """Return (init, step) of the stage; `train_config` is a config section like decoder.train."""
    optimiser = build_optimiser.optimiser(train_config)

    def init(key):
        keys, images = jax.random.split(key), jnp.zeros((1, image_size, image_size, 3))
        encoder = autoencoder.encoder.init(keys[0], images)["params"]
        latents = autoencoder.encode(encoder, images)
        decoder = autoencoder.decoder.init(keys[1], latents)["params"]
        return optim.init_state({"encoder": encoder, "decoder": decoder}, optimiser)

    def loss(params, images, key):
        moments = autoencoder.encoder.apply({"params": params["encoder"]}, autoencoder.encoder_input(images))
        mean, log_var = jnp.split(moments, 2, -1)
        sample = mean + jnp.exp(0.5 * log_var) * jax.random.normal(key, mean.shape)
        decoded = autoencoder.decode(params["decoder"], autoencoder.scale * sample)
        l1 = jnp.abs(decoded - images).mean()
        kl = 0.5 * (jnp.square(mean) + jnp.exp(log_var) - 1.0 - log_var).mean()
        total = l1 + kl_weight * kl
        return total, {"loss": total, "l1": l1, "kl": kl}

    def step(state, frozen, batch, key):
        grads, metrics = jax.grad(loss, has_aux=True)(state["params"], to_float(batch["image"]), key)
        state, metrics["grad_norm"] = optim.update(state, grads, optimiser, train_config.ema_decay)
        return state, metrics

    return init, step


def trained(stage, workdir, mesh):
    """Return the averaged weights of the last checkpoint."""
    shapes = {"ema_params": jax.eval_shape(stage.init, jax.random.key(0))["ema_params"]}
    folder = workdir / "checkpoints" / stage.name
    step = checkpoint_reader.latest_step(folder)
    restored = checkpoint_reader.restore_entries(folder, step, sharding.abstract(shapes, mesh))
    return jax.device_get(restored["ema_params"])
