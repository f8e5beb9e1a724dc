"""From labels to images: noise, guided trajectory, decoder. One compiled program, any number of images."""

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax import build, flow, guidance, logs, rae, sampling, sharding


def class_balanced(num_images, num_classes):
    """Labels of `num_images` images, classes in turn."""
    return np.arange(num_images) % num_classes


def make_sampler(config):
    """Returns jitted (parts, key, indices [B], labels [B]) -> uint8 images [B, H, W, 3].

    The noise of image i is a function of (key, i) alone.
    """
    autoencoder, dit = build.autoencoder(config), build.dit(config)
    shape = build.latent_shape(config)
    factor = flow.shift_factor(shape)
    times = sampling.time_grid(config.sampler.num_steps, factor)

    @jax.jit
    def sample(parts, key, indices, labels):
        noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(indices)
        velocity_fn = _velocity_fn(config, dit, parts["dit"], labels)
        latents = rae.denormalise(sampling.euler(velocity_fn, noise, times), parts["statistics"])
        return rae.to_uint8(autoencoder.decode(parts["decoder"], latents))

    return sample


def images(config, parts, labels, mesh, *, seed):
    """Yield uint8 images [<= B, H, W, 3] for the labels [N], batch after batch, all of them."""
    sample = make_sampler(config)
    key = jax.random.key(seed)
    size = config.evaluate.batch_size
    with logs.Progress("sample", total=len(labels), unit="image") as progress:
        for start in range(0, len(labels), size):
            indices = np.arange(start, start + size)
            batch = {"indices": indices.astype(np.uint32), "labels": np.resize(labels, len(labels) + size)[indices]}
            batch = sharding.put_batch(batch, mesh)
            out = np.asarray(sample(parts, key, batch["indices"], batch["labels"]))
            done = min(start + size, len(labels))
            progress.update(done)
            yield out[: done - start]


def _velocity_fn(config, dit, params, labels):
    def conditional(x, t):
        return dit.apply({"params": params}, x, t, labels)

    def unconditional(x, t):
        return dit.apply({"params": params}, x, t, jnp.full_like(labels, config.data.num_classes))

    g = config.guidance
    match g.method:
        case "none":
            return conditional
        case "cfg":
            return guidance.classifier_free(conditional, unconditional, scale=g.scale, t_min=g.t_min, t_max=g.t_max)
        case other:
            raise ValueError(f"unknown guidance {other!r}")
