"""Pre-training of the small encoder: its latents must hold the pixels' detail and the class.

The loss is the sum of two objectives on the same tokens. Pixels: one linear layer reconstructs each patch from its
token, to which noise was added; this keeps colour and edges in the latents, robust to noise. The target magnifies the
difference of a patch from its mean colour: otherwise detail lies in latent directions of such small variance that
decoder and DiT learn it slowly. Labels: one linear layer predicts the class from the mean token. At this size and in
minutes, labels are the most reliable source of semantic features (an early trial of masked autoencoding alone, on
harder images, stayed at a probe accuracy of 0.3).
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rae_jax.models.autoencoder import add_noise, normalise_image, to_float
from rae_jax.models.dense import Dense
from rae_jax.models.layers import patchify
from rae_jax.training import optim


def make(*, autoencoder, patch_size, num_classes, image_size, optimiser, ema_decay, noise_tau, detail, label_weight):
    """Return (init, step) of this stage. `noise_tau`, `detail` and `label_weight`: see configs/small.py."""
    pixel_head = Dense(3 * patch_size**2)
    class_head = nn.Dense(num_classes)

    def init(key):
        keys = jax.random.split(key, 3)
        images = jnp.zeros((1, image_size, image_size, 3), jnp.float32)
        encoder = autoencoder.encoder.init(keys[0], images)["params"]
        tokens = jnp.zeros((1, 1, autoencoder.encoder.width), jnp.float32)
        params = {
            "encoder": encoder,
            "pixels": pixel_head.init(keys[1], tokens)["params"],
            "classes": class_head.init(keys[2], tokens[0])["params"],
        }
        return optim.init_state(params, optimiser)

    def loss(params, images, labels, key):
        latents = autoencoder.encode(params["encoder"], images)
        noisy = add_noise(latents, key, noise_tau)
        noisy = noisy.reshape(noisy.shape[0], -1, noisy.shape[-1])
        target = patchify(normalise_image(images, autoencoder.mean, autoencoder.std), patch_size)
        target = magnify_detail(target, detail)
        pixels = jnp.abs(pixel_head.apply({"params": params["pixels"]}, noisy) - target).mean()
        logits = class_head.apply({"params": params["classes"]}, latents.mean((1, 2)))
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        accuracy = (logits.argmax(-1) == labels).mean()
        total = pixels + label_weight * cross_entropy
        return total, {"loss": total, "pixels": pixels, "cross_entropy": cross_entropy, "accuracy": accuracy}

    def step(state, frozen, batch, key):
        images = to_float(batch["image"])
        grads, metrics = jax.grad(loss, has_aux=True)(state["params"], images, batch["label"], key)
        state, metrics["grad_norm"] = optim.update(state, grads, optimiser, ema_decay)
        return state, metrics

    return init, step


def magnify_detail(patches, factor):
    """Return patches [B, N, p * p * 3] whose differences from their own mean colour are multiplied by `factor`."""
    pixels = patches.reshape(*patches.shape[:-1], -1, 3)
    mean = pixels.mean(-2, keepdims=True)
    return (mean + factor * (pixels - mean)).reshape(patches.shape)
