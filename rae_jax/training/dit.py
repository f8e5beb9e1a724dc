"""Stage 2: the diffusion transformer learns the velocity of latents on their way to noise."""

import jax
import jax.numpy as jnp

from rae_jax.diffusion import flow
from rae_jax.models.autoencoder import normalise, to_float
from rae_jax.training import optim


def make(*, autoencoder, dit, num_classes, latent_shape, path, target_fn, time_fn, shift_factor, train):
    """Returns (init, step) of this stage; `train` is the config section dit.train.

    `time_fn(key, batch_size)` draws times, which `shift_factor` then moves, `target_fn(x, noise, t)` is what the model
    is to say at x_t. A batch holds images, or 'latent', which was encoded before.
    """
    optimiser = optim.make(train)

    def init(key):
        one = jnp.ones((1,))
        params = dit.init(key, jnp.zeros((1, *latent_shape)), one, one.astype(jnp.int32))["params"]
        return optim.init_state(params, optimiser, len(train.more_ema_decays))

    def loss(params, examples):
        output = dit.apply({"params": params}, examples["x_t"], examples["t"], examples["label"])
        return jnp.square(output - examples["target"]).mean()

    def step(state, frozen, batch, key):
        time_key, noise_key, drop_key = jax.random.split(key, 3)
        if "latent" in batch:
            latents = batch["latent"].astype(jnp.float32)
        else:
            latents = autoencoder.encode(frozen["encoder"], to_float(batch["image"]))
        x = normalise(latents, frozen["statistics"])
        t = flow.shift_time(time_fn(time_key, x.shape[0]), shift_factor)
        noise = jax.random.normal(noise_key, x.shape)
        dropped = jax.random.bernoulli(drop_key, train.label_dropout, t.shape)
        examples = {
            "x_t": flow.interpolate(x, noise, t, path),
            "t": t,
            "label": jnp.where(dropped, num_classes, batch["label"]),
            "target": target_fn(x, noise, t),
        }
        value, grads = optim.value_and_grad(loss, state["params"], examples, train.microbatches)
        state, grad_norm = optim.update(state, grads, optimiser, train.ema_decay, train.more_ema_decays)
        return state, {"loss": value, "grad_norm": grad_norm}

    return init, step
