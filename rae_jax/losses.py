"""Losses of images and of discriminator logits."""

import jax
import jax.numpy as jnp


def hinge_discriminator(real, fake):
    """0.5 (relu(1 - real) + relu(1 + fake)), averaged over logits."""
    return 0.5 * (jax.nn.relu(1.0 - real).mean() + jax.nn.relu(1.0 + fake).mean())


def vanilla_discriminator(real, fake):
    """0.5 (softplus(-real) + softplus(fake)), averaged over logits: the original GAN's cross-entropy."""
    return 0.5 * (jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean())


def generator(fake):
    """-mean(fake), whichever loss the discriminator has."""
    return -fake.mean()


def adaptive_weight(reconstruction_gradient, adversarial_gradient, *, maximum=1e4):
    """Ratio of two gradients' norms at the decoder's last weight (VQGAN), a constant to differentiation."""
    ratio = _norm(reconstruction_gradient) / (_norm(adversarial_gradient) + 1e-6)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, maximum))


def _norm(x):
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32))))
