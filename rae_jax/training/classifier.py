"""Training of the judge: a classifier of real images, which later predicts the class of generated images."""

import jax
import jax.numpy as jnp
import optax

from rae_jax.models.autoencoder import to_float
from rae_jax.training import optim


def make(*, classifier, image_size, optimiser, ema_decay):
    """Return (init, step) of this stage."""

    def init(key):
        params = classifier.init(key, jnp.zeros((1, image_size, image_size, 3), jnp.float32))["params"]
        return optim.init_state(params, optimiser)

    def loss(params, images, labels):
        logits = classifier.apply({"params": params}, images)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return cross_entropy, {"loss": cross_entropy, "accuracy": (logits.argmax(-1) == labels).mean()}

    def step(state, frozen, batch, key):
        images = to_float(batch["image"])
        grads, metrics = jax.grad(loss, has_aux=True)(state["params"], images, batch["label"])
        state, metrics["grad_norm"] = optim.update(state, grads, optimiser, ema_decay)
        return state, metrics

    return init, step
