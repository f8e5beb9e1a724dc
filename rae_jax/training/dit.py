"""Stage 2: the diffusion transformer learns its prediction at points between data and noise."""

import jax
import jax.numpy as jnp

from rae_jax.diffusion import flow
from rae_jax.models.autoencoder import normalise, to_float
from rae_jax.training import optim


def make(
    *,
    autoencoder,
    dit,
    condition,
    latent_shape,
    prediction,
    time_fn,
    shift_factor,
    optimiser,
    ema_decay,
    more_ema_decays,
    condition_dropout,
    microbatches,
    base_weight=0.0,
):
    """Return (init, step) of this stage.

    `condition`: a models.conditions.Condition, replaced by null with probability `condition_dropout`. `prediction`: a
    flow.Prediction. `time_fn(key, batch_size)` draws times, which `shift_factor` then shifts. `base_weight`: the weight
    of the loss of the DiT's base output; 0: no such loss. A batch holds 'image', or 'latent' if the images were
    encoded before.
    """

    def init(key):
        conditions = condition.zeros(1)
        x, t = jnp.zeros((1, *latent_shape), jnp.float32), jnp.ones(1, jnp.float32)
        params = dit.init(key, x, t, conditions)["params"]
        return optim.init_state(params, optimiser, len(more_ema_decays))

    def loss(params, examples):
        options = {"base": True} if base_weight else {}
        outputs = dit.apply({"params": params}, examples["x_t"], examples["t"], examples["condition"], **options)
        if not base_weight:
            return error(outputs, examples), {}
        full, base = (error(output, examples) for output in outputs)
        return full + base_weight * base, {"full_loss": full, "base_loss": base}

    def error(output, examples):
        if prediction.weight is None:
            return jnp.square(output - examples["target"]).mean()
        return (jnp.square(output - examples["target"]).mean((1, 2, 3)) * prediction.weight(examples["t"])).mean()

    def step(state, frozen, batch, key):
        time_key, noise_key, drop_key = jax.random.split(key, 3)
        x = latents(autoencoder, frozen, batch)
        t = flow.shift_time(time_fn(time_key, x.shape[0]), shift_factor)
        noise = jax.random.normal(noise_key, x.shape, jnp.float32)
        examples = {
            "x_t": flow.interpolate(x, noise, t, prediction.path),
            "t": t,
            "condition": dropped(condition, drop_key, condition_dropout, batch["label"]),
            "target": prediction.target(x, noise, t),
        }
        (value, metrics), grads = optim.value_and_grad(loss, state["params"], examples, microbatches)
        state, grad_norm = optim.update(state, grads, optimiser, ema_decay, more_ema_decays)
        return state, {"loss": value, **metrics, "grad_norm": grad_norm}

    return init, step


def latents(autoencoder, frozen, batch):
    """Return the normalised latents of a batch: of its 'image', or its 'latent' if the images were encoded before."""
    if "latent" in batch:
        found = batch["latent"].astype(jnp.float32)
    else:
        found = autoencoder.encode(frozen["encoder"], to_float(batch["image"]))
    return normalise(found, frozen["statistics"])


def dropped(condition, key, probability, labels):
    """Return the labels [B], each replaced by the null condition with a probability."""
    return condition.with_null(labels, jax.random.bernoulli(key, jnp.float32(probability), labels.shape[:1]))
