"""Stage 1: the decoder learns to draw images from noise-augmented latents, against a discriminator.

One step updates the decoder, its average, and then the discriminator. When the adversarial parts start is decided
inside the compiled step; the loop knows no phases.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from rae_jax import losses, optim, rae
from rae_jax.augment import diff_augment

_DISC = ("disc_params", "disc_spectral", "disc_opt_state")  # the discriminator's entries of the state


def make(*, autoencoder, heads, layers, latent_shape, train):
    """Returns (init, step) of this stage; `train` is the config section decoder.train.

    `heads` judges the tokens of the blocks `layers` of a frozen backbone, which shares the encoder's architecture.
    """
    game = _Game(autoencoder, heads, layers, latent_shape, train, optim.make(train))
    return game.init, game.step


@dataclasses.dataclass(frozen=True)
class _Game:
    """The decoder against the discriminator: pure functions of state, frozen weights, batch and key."""

    autoencoder: object
    heads: object
    layers: tuple
    latent_shape: tuple
    train: object
    optimiser: object  # of each player, who keeps a state of its own

    def init(self, key):
        decoder_key, heads_key = jax.random.split(key)
        height, width, channels = self.latent_shape
        params = self.autoencoder.decoder.init(decoder_key, jnp.zeros((1, height, width, channels)))["params"]
        disc = self.heads.init(heads_key, jnp.zeros((len(self.layers), 1, height * width, channels)))
        return {
            **optim.init_state(params, self.optimiser),
            "disc_params": disc["params"],
            "disc_spectral": disc["spectral"],
            "disc_opt_state": self.optimiser.init(disc["params"]),
        }

    def step(self, state, frozen, batch, key):
        noise_key, fool_key, disc_key = jax.random.split(key, 3)
        images = rae.to_float(batch["image"])
        latents = self.autoencoder.encode(frozen["encoder"], images)
        noisy = rae.add_noise(latents, noise_key, self.train.noise_tau)
        grads, metrics = self.decoder_gradients(state, frozen, noisy, images, fool_key)
        started = state["step"] >= self.train.discriminator_start
        state, metrics["grad_norm"] = optim.update(state, grads, self.optimiser, self.train.ema_decay)

        def wait(state):
            zeros = dict.fromkeys(("discriminator", "logits_real", "logits_fake"), jnp.zeros(()))
            return {name: state[name] for name in _DISC}, zeros

        def learn(state):
            return self.update_discriminator(state, frozen, latents, images, disc_key)

        disc, disc_metrics = jax.lax.cond(started, learn, wait, state)
        return {**state, **disc}, {**metrics, **disc_metrics}

    def decoder_gradients(self, state, frozen, latents, images, key):
        """Gradients of L1 and, once it is active, the adversarial loss in its adaptive weight; and metrics."""
        params, train = state["params"], self.train
        disc = {"params": state["disc_params"], "spectral": state["disc_spectral"]}
        features, pull_features = jax.vjp(lambda p: self.autoencoder.features(p, latents), params)
        decoded, pull_pixels = jax.vjp(self.autoencoder.pixels, params, features)

        def reconstruction(decoded):
            return jnp.abs(decoded - images).mean()

        def adversarial(decoded):
            return losses.generator(self.discriminate(frozen, disc, decoded, key)[0])

        def last_layer(cotangent):
            return pull_pixels(cotangent)[0]["pred"]["kernel"]

        l1, at_image = jax.value_and_grad(reconstruction)(decoded)
        active = state["step"] >= train.adversarial_start
        off = lambda decoded: (jnp.zeros(()), jnp.zeros_like(decoded))  # noqa: E731
        fooled, adversarial_at_image = jax.lax.cond(active, jax.value_and_grad(adversarial), off, decoded)
        weight = losses.adaptive_weight(last_layer(at_image), last_layer(adversarial_at_image))
        weight = jnp.where(active, train.adversarial_weight * weight, 0.0)

        # Both losses meet at the image, so that one backward pass of the decoder serves them both.
        pixel_grads, at_features = pull_pixels(at_image + weight * adversarial_at_image)
        grads = jax.tree.map(jnp.add, pixel_grads, pull_features(at_features)[0])
        loss = l1 + weight * fooled
        return grads, {"loss": loss, "l1": l1, "adversarial": fooled, "adversarial_weight": weight}

    def update_discriminator(self, state, frozen, latents, images, key):
        """The discriminator's new entries of the state, and metrics."""
        # A fresh, noise-free, 8-bit reconstruction by the updated decoder: what the images will really look like.
        fake = self.autoencoder.decode(state["params"], latents)
        fake = jnp.round(jnp.clip(fake, 0.0, 1.0) * 255.0) / 255.0
        both = jax.lax.stop_gradient(jnp.concatenate([images, fake]))

        def loss(disc_params):
            disc = {"params": disc_params, "spectral": state["disc_spectral"]}
            logits, moved = self.discriminate(frozen, disc, both, key, mutable=["spectral"])
            real, fake = jnp.split(logits, 2)
            metrics = {"logits_real": real.mean(), "logits_fake": fake.mean()}
            return losses.hinge_discriminator(real, fake), (metrics, moved["spectral"])

        (value, (metrics, spectral)), grads = jax.value_and_grad(loss, has_aux=True)(state["disc_params"])
        updates, opt_state = self.optimiser.update(grads, state["disc_opt_state"], state["disc_params"])
        new = (optax.apply_updates(state["disc_params"], updates), spectral, opt_state)
        return dict(zip(_DISC, new, strict=True)), {"discriminator": value, **metrics}

    def discriminate(self, frozen, disc, images, key, mutable=()):
        """Logits of images in [0, 1], each augmented at random, and what moved of the mutable collections."""
        augmented = (diff_augment(images * 2.0 - 1.0, key) + 1.0) / 2.0
        return self.heads.apply(
            disc, self.autoencoder.tokens(frozen["backbone"], augmented, self.layers), mutable=mutable
        )
