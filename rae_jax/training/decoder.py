"""Stage 1: the decoder learns to reconstruct images from noise-augmented latents, against a discriminator.

One step updates the decoder, its average, and then the discriminator. The compiled step decides when the adversarial
parts start; the loop knows no phases.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rae_jax.models.autoencoder import Backbone, add_noise, to_float
from rae_jax.training import optim
from rae_jax.training.adversarial import adaptive_weight, generator_loss

_DISC = ("disc_params", "disc_spectral", "disc_opt_state")  # the discriminator's entries of the state
_DISC_METRICS = ("discriminator", "discriminator_grad_norm", "logits_real", "logits_fake")


@dataclasses.dataclass(frozen=True)
class Discriminator:
    """Trained heads on the tokens of a frozen backbone, with their augmentation and loss."""

    backbone: Backbone
    heads: object  # module: tokens [L, B, N, D] -> logits; training updates its collection 'spectral'
    augment: Callable  # (images in [-1, 1], key) -> images
    loss: Callable  # (logits of real images, logits of fake images) -> loss

    def init(self, key):
        """Return {'params', 'spectral'} of the heads."""
        return self.heads.init(key, jnp.zeros(self.backbone.shape, jnp.float32))

    def logits(self, frozen, variables, images, key, mutable=()):
        """Return logits of images around [0, 1], each augmented alone, and the updated mutable collections."""
        augmented = (self.augment(images * 2.0 - 1.0, key) + 1.0) / 2.0
        return self.heads.apply(variables, self.backbone(frozen, augmented), mutable=mutable)


@dataclasses.dataclass(frozen=True)
class Objective:
    """The terms of the decoder's loss besides L1, and the first steps of the adversarial terms."""

    discriminator: Discriminator | None  # its frozen weights are frozen['backbone']; None: no adversarial loss
    perceptual: Callable | None  # (frozen['lpips'], decoded, images) -> distances [B] of images in [0, 1]
    perceptual_weight: float
    adversarial_weight: float
    discriminator_start: int  # first step that updates the discriminator
    adversarial_start: int  # first step in which the decoder's loss has its adversarial term
    noise_tau: float  # largest standard deviation of the noise that is added to latents


def make(*, autoencoder, objective, latent_shape, optimiser, ema_decay):
    """Return (init, step) of this stage.

    The decoder and the discriminator have separate states of `optimiser`: each schedule starts with the first update of
    its network.
    """
    stage = _Stage(autoencoder, objective, latent_shape, optimiser, ema_decay)
    return stage.init, stage.step


@dataclasses.dataclass(frozen=True)
class _Stage:
    """Pure functions of state, frozen weights, batch and key."""

    autoencoder: object
    objective: Objective
    latent_shape: tuple
    optimiser: object
    ema_decay: float

    def init(self, key):
        decoder_key, heads_key = jax.random.split(key)
        params = self.autoencoder.decoder.init(decoder_key, jnp.zeros((1, *self.latent_shape), jnp.float32))["params"]
        state = optim.init_state(params, self.optimiser)
        if self.objective.discriminator is None:
            return state
        disc = self.objective.discriminator.init(heads_key)
        new = (disc["params"], disc["spectral"], self.optimiser.init(disc["params"]))
        return {**state, **dict(zip(_DISC, new, strict=True))}

    def step(self, state, frozen, batch, key):
        noise_key, adversarial_key, disc_key = jax.random.split(key, 3)
        images = to_float(batch["image"])
        latents = self.autoencoder.encode(frozen["encoder"], images)
        noisy = add_noise(latents, noise_key, self.objective.noise_tau)
        grads, metrics = self.decoder_gradients(state, frozen, noisy, images, adversarial_key)
        started = state["step"] >= self.objective.discriminator_start
        state, metrics["grad_norm"] = optim.update(state, grads, self.optimiser, self.ema_decay)
        if self.objective.discriminator is None:
            return state, metrics

        def skip(state):
            return {name: state[name] for name in _DISC}, dict.fromkeys(_DISC_METRICS, jnp.float32(0))

        def update(state):
            return self.update_discriminator(state, frozen, latents, images, disc_key)

        disc, disc_metrics = jax.lax.cond(started, update, skip, state)
        return {**state, **disc}, {**metrics, **disc_metrics}

    def decoder_gradients(self, state, frozen, latents, images, key):
        """Return gradients of the reconstruction loss plus the weighted adversarial loss, once active; and metrics.

        The decoder takes one forward and one backward pass: the losses are added at the image. For the two norms of the
        adaptive weight, the cotangent of each loss goes through the last layer alone.
        """
        params, objective = state["params"], self.objective
        features, pull_features = jax.vjp(lambda p: self.autoencoder.features(p, latents), params)
        decoded, pull_pixels = jax.vjp(self.autoencoder.pixels, params, features)

        def reconstruction(decoded):
            terms = {"l1": jnp.abs(decoded - images).mean()}
            loss = terms["l1"]
            if objective.perceptual is not None:
                terms["lpips"] = objective.perceptual(frozen["lpips"], decoded, images).mean()
                loss = loss + objective.perceptual_weight * terms["lpips"]
            return loss, terms

        (loss, metrics), at_image = jax.value_and_grad(reconstruction, has_aux=True)(decoded)
        if objective.discriminator is not None:
            active = state["step"] >= objective.adversarial_start
            adversarial, adversarial_at_image = self.adversarial(state, frozen, decoded, key, active)

            def last_layer(cotangent):
                return pull_pixels(cotangent)[0]["pred"]["kernel"]

            weight = adaptive_weight(last_layer(at_image), last_layer(adversarial_at_image))
            weight = jnp.where(active, objective.adversarial_weight * weight, 0.0)
            loss, at_image = loss + weight * adversarial, at_image + weight * adversarial_at_image
            metrics = {**metrics, "adversarial": adversarial, "adversarial_weight": weight}

        pixel_grads, at_features = pull_pixels(at_image)
        grads = jax.tree.map(jnp.add, pixel_grads, pull_features(at_features)[0])
        return grads, {"loss": loss, **metrics}

    def adversarial(self, state, frozen, decoded, key, active):
        """Return the adversarial loss of decoded images and its gradient at them; zeros while it is not active."""
        disc = {"params": state["disc_params"], "spectral": state["disc_spectral"]}

        def loss(decoded):
            return generator_loss(self.objective.discriminator.logits(frozen["backbone"], disc, decoded, key)[0])

        def zeros(decoded):
            return jnp.float32(0), jnp.zeros_like(decoded)

        return jax.lax.cond(active, jax.value_and_grad(loss), zeros, decoded)

    def update_discriminator(self, state, frozen, latents, images, key):
        """Return the discriminator's new entries of the state, and metrics."""
        # A noise-free 8-bit reconstruction by the updated decoder, like the images of the trained model.
        fake = self.autoencoder.decode(state["params"], latents)
        fake = jnp.round(jnp.clip(fake, 0.0, 1.0) * 255.0) / 255.0
        # Each fake image follows its real image: on a mesh, both stay on their device.
        both = jax.lax.stop_gradient(jnp.stack([images, fake], 1).reshape(-1, *images.shape[1:]))

        def loss(disc_params):
            disc = {"params": disc_params, "spectral": state["disc_spectral"]}
            logits, updated = self.objective.discriminator.logits(
                frozen["backbone"], disc, both, key, mutable=["spectral"]
            )
            real, fake = jnp.moveaxis(logits.reshape(-1, 2, logits.shape[-1]), 1, 0)
            return self.objective.discriminator.loss(real, fake), (updated["spectral"], real.mean(), fake.mean())

        (value, (spectral, real, fake)), grads = jax.value_and_grad(loss, has_aux=True)(state["disc_params"])
        updates, opt_state = self.optimiser.update(grads, state["disc_opt_state"], state["disc_params"])
        new = (optax.apply_updates(state["disc_params"], updates), spectral, opt_state)
        metrics = (value, optax.tree.norm(grads), real, fake)
        return dict(zip(_DISC, new, strict=True)), dict(zip(_DISC_METRICS, metrics, strict=True))
