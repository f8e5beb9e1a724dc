"""The oracle of training/test_decoder_step.py: a step of both players, written from the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import step_oracles

from rae_jax.build import models, objectives


def _augmented(images, key):
    """DiffAug of images in [-1, 1]: each one shifted, by matrices of 0 and 1; then brightness, saturation, contrast."""
    size, *colours, translation = images.shape[0], *jax.random.split(key, 4)
    brightness, saturation, contrast = (jax.random.uniform(key, (size, 1, 1, 1)) for key in colours)
    offsets = jax.random.randint(translation, (size, 2), 0, 2 * 4 + 1) - 4  # an eighth of 32 pixels, both ways
    place = jnp.arange(32)
    down, right = ((place[:, None] + offsets[:, i, None, None] == place).astype(jnp.float32) for i in (0, 1))
    images = jnp.einsum("bij,bkl,bjlc->bikc", down, right, images)
    images = images + brightness - 0.5
    grey = images.mean(-1, keepdims=True)
    images = grey + 2 * saturation * (images - grey)
    mean = images.mean((1, 2, 3), keepdims=True)
    return mean + (0.5 + contrast) * (images - mean)


def iterated(variables):
    """Singular vectors after one power iteration: of {'params', 'spectral'}, a tree {head: {conv: {'u', 'v'}}}."""

    def moved(kernel, u):
        matrix = np.float64(kernel).reshape(-1, kernel.shape[-1])
        v = matrix @ np.float64(u)
        v /= np.linalg.norm(v)
        u = matrix.T @ v
        return {"u": np.float32(u / np.linalg.norm(u)), "v": np.float32(v)}

    return {
        head: {conv: moved(variables["params"][head][conv]["kernel"], of["u"]) for conv, of in convolutions.items()}
        for head, convolutions in variables["spectral"].items()
    }


def rate(train, count):
    """The learning rate after `count` updates: half a cosine from the highest rate down to the last one."""
    low = train.final_learning_rate
    return low + (train.learning_rate - low) * 0.5 * (1 + np.cos(np.pi * count / train.num_steps))


class Oracle:
    """The equations of a step of both players, from the state `before` with the draws of `key`."""

    def __init__(self, game, batch, perceptual, before, key):
        self.train, self.frozen, self.before = game.config.decoder.train, game.frozen, before
        self.autoencoder, self.disc = (
            models.autoencoder(game.config),
            objectives.decoder_objective(game.config).discriminator,
        )
        noise_key, self.fool_key, self.disc_key = jax.random.split(key, 3)
        self.perceptual, self.images = perceptual, batch["image"] / np.float32(255)
        self.latents = step_oracles.latents(game.config, self.autoencoder, game.frozen["encoder"], batch["image"])
        sigma_key, noise_key = jax.random.split(noise_key)
        sigma = self.train.noise_tau * jax.random.uniform(sigma_key, (len(self.images), 1, 1, 1))
        self.noisy = self.latents + sigma * jax.random.normal(noise_key, self.latents.shape)

    def decode(self, params, latents):
        module, std, mean = self.autoencoder.decoder, *map(jnp.asarray, (self.autoencoder.std, self.autoencoder.mean))
        return module.apply({"params": params}, latents) * std + mean

    def logits(self, params, spectral, images, key):
        tokens = self.disc.backbone(self.frozen["backbone"], (_augmented(2 * images - 1, key) + 1) / 2)
        return self.disc.heads.apply({"params": params, "spectral": spectral}, tokens)

    def decoder(self):
        """(reconstruction loss, its gradient, the adversarial loss, its gradient), each by a pass of its own."""

        def reconstruction(params):
            decoded = self.decode(params, self.noisy)
            distances = self.perceptual(self.frozen["lpips"], decoded, self.images)
            return jnp.abs(decoded - self.images).mean() + self.train.lpips_weight * distances.mean()

        def adversarial(params):
            decoded, heads = self.decode(params, self.noisy), self.before
            return -self.logits(heads["disc_params"], heads["disc_spectral"], decoded, self.fool_key).mean()

        passes = jax.jit(
            lambda params: [*jax.value_and_grad(reconstruction)(params), *jax.value_and_grad(adversarial)(params)]
        )
        return passes(self.before["params"])

    def discriminator(self, new_params, spectral):
        """((loss, (logits of real images, of fake ones)), gradient) with the updated decoder's images, in 8 bits."""
        fake = np.clip(np.asarray(jax.jit(self.decode)(new_params, self.latents)), 0, 1)
        fake = np.round(fake * 255) / np.float32(255)
        # Each fake one after its real one: that is how augmentations are drawn for them.
        both = jnp.asarray(np.stack([self.images, fake], 1).reshape(-1, 32, 32, 3))

        def hinge(params):
            logits = self.logits(params, spectral, both, self.disc_key)
            real, fake = logits[0::2], logits[1::2]
            return 0.5 * (jnp.maximum(1 - real, 0).mean() + jnp.maximum(1 + fake, 0).mean()), (real, fake)

        return jax.jit(jax.value_and_grad(hinge, has_aux=True))(self.before["disc_params"])
