"""Stage 1: the decoder learns to draw images from noise-augmented latents, against a discriminator.

One step updates the decoder, its average, and then the discriminator. When the adversarial parts start is decided
inside the compiled step; the loop knows no phases.
"""

import jax
import jax.numpy as jnp
import optax

from rae_jax import losses, optim, rae
from rae_jax.augment import diff_augment


def make(*, autoencoder, heads, layers, latent_shape, train):
    """Returns (init, step) of this stage; `train` is the config section decoder.train.

    `heads` judges the tokens of the blocks `layers` of a frozen backbone, which shares the encoder's architecture.
    """
    optimiser = optim.adamw(train)
    disc_optimiser = optim.adamw(train)

    def init(key):
        decoder_key, heads_key = jax.random.split(key)
        params = autoencoder.decoder.init(decoder_key, jnp.zeros((1, *latent_shape)))["params"]
        tokens = jnp.zeros((len(layers), 1, latent_shape[0] * latent_shape[1], autoencoder.encoder.width))
        disc = heads.init(heads_key, tokens)
        return {
            **optim.init_state(params, optimiser),
            "disc_params": disc["params"],
            "disc_spectral": disc["spectral"],
            "disc_opt_state": disc_optimiser.init(disc["params"]),
        }

    def discriminate(frozen, disc, images, key, mutable=()):
        augmented = (diff_augment(images * 2.0 - 1.0, key) + 1.0) / 2.0
        return heads.apply(disc, autoencoder.tokens(frozen["backbone"], augmented, layers), mutable=mutable)

    def decoder_gradients(state, frozen, latents, images, key):
        params = state["params"]
        disc = {"params": state["disc_params"], "spectral": state["disc_spectral"]}
        features, pull_features = jax.vjp(lambda p: autoencoder.features(p, latents), params)
        decoded, pull_pixels = jax.vjp(lambda p, f: autoencoder.pixels(p, f, latents.shape[1:3]), params, features)

        def reconstruction(decoded):
            return jnp.abs(decoded - images).mean()

        def adversarial(decoded):
            return losses.generator(discriminate(frozen, disc, decoded, key)[0])

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

    def update_discriminator(state, frozen, latents, images, key):
        # A fresh, noise-free, 8-bit reconstruction by the updated decoder: what the images will really look like.
        fake = autoencoder.decode(state["params"], latents)
        fake = jnp.round(jnp.clip(fake, 0.0, 1.0) * 255.0) / 255.0
        both = jax.lax.stop_gradient(jnp.concatenate([images, fake]))

        def loss(disc_params):
            disc = {"params": disc_params, "spectral": state["disc_spectral"]}
            logits, moved = discriminate(frozen, disc, both, key, mutable=["spectral"])
            real, fake = jnp.split(logits, 2)
            metrics = {"logits_real": real.mean(), "logits_fake": fake.mean()}
            return losses.hinge_discriminator(real, fake), (metrics, moved["spectral"])

        (value, (metrics, spectral)), grads = jax.value_and_grad(loss, has_aux=True)(state["disc_params"])
        updates, opt_state = disc_optimiser.update(grads, state["disc_opt_state"], state["disc_params"])
        new = {
            "disc_params": optax.apply_updates(state["disc_params"], updates),
            "disc_spectral": spectral,
            "disc_opt_state": opt_state,
        }
        return new, {"discriminator": value, **metrics}

    def step(state, frozen, batch, key):
        noise_key, fool_key, disc_key = jax.random.split(key, 3)
        images = rae.to_float(batch["image"])
        latents = autoencoder.encode(frozen["encoder"], images)
        noisy = rae.add_noise(latents, noise_key, train.noise_tau)
        grads, metrics = decoder_gradients(state, frozen, noisy, images, fool_key)
        started = state["step"] >= train.discriminator_start
        state, metrics["grad_norm"] = optim.update(state, grads, optimiser, train.ema_decay)

        def wait(state):
            zeros = dict.fromkeys(("discriminator", "logits_real", "logits_fake"), jnp.zeros(()))
            return {name: state[name] for name in ("disc_params", "disc_spectral", "disc_opt_state")}, zeros

        def learn(state):
            return update_discriminator(state, frozen, latents, images, disc_key)

        disc, disc_metrics = jax.lax.cond(started, learn, wait, state)
        return {**state, **disc}, {**metrics, **disc_metrics}

    return init, step
