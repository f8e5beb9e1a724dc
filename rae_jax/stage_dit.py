"""Stage 2: the diffusion transformer learns the velocity of latents on their way to noise."""

import jax
import jax.numpy as jnp

from rae_jax import flow, optim, rae


def make(*, autoencoder, dit, num_classes, latent_shape, train):
    """Returns (init, step) of this stage; `train` is the config section dit.train."""
    optimiser = optim.make(train)
    factor = flow.shift_factor(latent_shape)

    def init(key):
        one = jnp.ones((1,))
        params = dit.init(key, jnp.zeros((1, *latent_shape)), one, one.astype(jnp.int32))["params"]
        return optim.init_state(params, optimiser)

    def step(state, frozen, batch, key):
        time_key, noise_key, drop_key = jax.random.split(key, 3)
        latents = autoencoder.encode(frozen["encoder"], rae.to_float(batch["image"]))
        x = rae.normalise(latents, frozen["statistics"])
        t = flow.sample_time(time_key, x.shape[0], factor=factor, mean=train.time_mean, std=train.time_std)
        noise = jax.random.normal(noise_key, x.shape)
        x_t = flow.interpolate(x, noise, t)
        dropped = jax.random.bernoulli(drop_key, train.label_dropout, t.shape)
        labels = jnp.where(dropped, num_classes, batch["label"])

        def loss(params):
            v = dit.apply({"params": params}, x_t, t, labels)
            return jnp.square(v - flow.velocity(x, noise)).mean()

        value, grads = jax.value_and_grad(loss)(state["params"])
        state, grad_norm = optim.update(state, grads, optimiser, train.ema_decay)
        return state, {"loss": value, "grad_norm": grad_norm}

    return init, step
