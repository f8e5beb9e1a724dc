"""From labels to images: noise, guided trajectory, decoder. One compiled program, any number of images."""

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax import build, build_flow, flow, logs, rae, sharding


def class_balanced(num_images, num_classes):
    """Labels of `num_images` images, classes in turn."""
    return np.arange(num_images) % num_classes


def make_sampler(config):
    """Returns jitted (parts, key, indices [B], labels [B]) -> uint8 images [B, H, W, 3].

    Everything random about image i is a function of (key, i) alone. `parts` has 'guide', the weak model's weights,
    where the guidance is AutoGuidance.
    """
    autoencoder = build.autoencoder(config)
    shape = build.latent_shape(config)
    times = build_flow.times(config, flow.shift_factor(shape))

    @jax.jit
    def sample(parts, key, indices, labels):
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)

        def noise_fn(n):
            return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, n), shape))(keys)

        latents = build_flow.solve(config, _guided(config, parts, labels), noise, times, noise_fn)
        return rae.to_uint8(autoencoder.decode(parts["decoder"], rae.denormalise(latents, parts["statistics"])))

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


def _guided(config, parts, labels):
    """(condition_fn, velocity_fn) of the DiT for these labels under the config's guidance."""
    no_label = jnp.full_like(labels, config.data.num_classes)
    strong = _halves(config, config.dit, parts["dit"], labels)
    match config.guidance.method:
        case "none":
            weak = None
        case "cfg":
            weak = _halves(config, config.dit, parts["dit"], no_label)
        case "autoguidance":
            weak = _halves(config, config.guidance.dit, parts["guide"], labels)
        case other:
            raise ValueError(f"unknown guidance {other!r}")
    return build_flow.guided(config, strong, weak)


def _halves(config, sizes, params, labels):
    """(condition_fn, velocity_fn): trunk and head of a DiT^DH of those sizes; a plain DiT is all in the latter."""
    dit, params, to_velocity = build.dit(config, sizes), {"params": params}, build_flow.to_velocity(config)
    if sizes.head_depth == 0:
        return lambda x, t: (), lambda x, t, s: to_velocity(dit.apply(params, x, t, labels), x, t)

    def condition_fn(x, t):
        return dit.apply(params, x, t, labels, method="condition")

    def velocity_fn(x, t, s):
        return to_velocity(dit.apply(params, x, t, s, method="velocity"), x, t)

    return condition_fn, velocity_fn
