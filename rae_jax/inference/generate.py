"""Images from labels: noise, guided trajectory, decoder. One compiled program for any number of images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax.build import models
from rae_jax.build import sampler as build_sampler
from rae_jax.config.keys import latent_shape
from rae_jax.diffusion import flow
from rae_jax.errors import UserError
from rae_jax.models.autoencoder import denormalise, to_uint8
from rae_jax.runtime import logs, sharding


def make_sampler(config, mesh):
    """Return `sampler(config)` compiled for a mesh."""
    return sharding.jit(sampler(config), mesh)


def sampler(config):
    """Return the pure function (parts, key, indices [B], labels [B]) -> (uint8 images [B, H, W, 3], finite [B]).

    `finite` is False for an image with a value that is not finite, which uint8 cannot show. All random
    numbers of image i are a function of (key, i) alone. `parts`: see part_weights.parts_of_sampling.
    """
    autoencoder = models.autoencoder(config)

    def sample(parts, key, indices, labels):
        latents = draw(config, parts, key, indices, labels)
        images = autoencoder.decode(parts["decoder"], latents)
        return to_uint8(images), jnp.isfinite(images).all((1, 2, 3))

    return sample


def random_key(seed):
    """Return JAX's key of the low 32 bits of a seed; the high 32 bits, unless they are 0, are folded in."""
    key = jax.random.key(seed % 2**32)
    return jax.random.fold_in(key, seed >> 32) if seed >> 32 else key


def draw(config, parts, key, indices, labels, *, scale=None):
    """Return denormalised latents [B, h, w, D], the decoder's input, for indices and labels [B]; pure.

    `parts`: see part_weights.parts_of_sampling, without the decoder. `scale` replaces config.guidance.scale.
    """
    shape, keys = latent_shape(config), _keys(key, indices)

    def noise_fn(n):
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, n), shape, jnp.float32))(keys)

    velocity = build_sampler.velocity_of_generator(config, parts, labels, scale)
    latents = build_sampler.sampler(config).solve(velocity, first_noise(config, key, indices), noise_fn)
    return denormalise(latents, parts["statistics"])


def times(config):
    """Return the sampler's times, from noise to data; concrete numbers, also inside jit."""
    return build_sampler.sampler(config).times


def first_noise(config, key, indices):
    """Return the noise [B, h, w, D] from which the images with these indices start."""
    shape = latent_shape(config)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(_keys(key, indices))


def _keys(key, indices):
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)


def euler_step(config, parts, x, t, t_next, labels, scale):
    """Return (x at time t_next, the denormalised clean latents that are predicted from x [B, h, w, D] at time t)."""
    all_t = jnp.full(x.shape[:1], t, jnp.float32)
    v = build_sampler.velocity(config, parts, labels, scale)(x, all_t)
    predicted = flow.data_of(v, x, all_t, build_sampler.prediction(config).path)
    return x + (t_next - t) * v, denormalise(predicted, parts["statistics"])


def batches(sample, parts, labels, mesh, *, batch_size, seed, present=frozenset()):
    """Yield (indices [<= B], uint8 images [<= B, H, W, 3]) for labels [N], one batch of B computed ahead.

    `sample` is the result of make_sampler. B is `batch_size`, a multiple of sharding.ways(mesh). A batch is
    left out if all its indices are in `present`; the other batches do not change. Raises UserError for an image that
    is not finite.
    """
    key, gather, size = random_key(seed), _gather(mesh), batch_size
    wanted = [range(start, min(start + size, len(labels))) for start in range(0, len(labels), size)]
    wanted = [indices for indices in wanted if not present.issuperset(indices)]
    skipped = len(labels) - sum(map(len, wanted))

    def compute(indices):
        padded = np.resize(indices, size)
        batch = sharding.put_global({"indices": padded.astype(np.uint32), "labels": labels[padded]}, mesh)
        return gather(sample(parts, key, batch["indices"], batch["labels"]))

    with logs.Progress("sample", total=len(labels), start=skipped, unit="image") as progress:
        ahead = compute(wanted[0]) if wanted else None
        done = skipped
        for n, indices in enumerate(wanted):
            images, finite = ahead
            if n + 1 < len(wanted):
                ahead = compute(wanted[n + 1])
            done += len(indices)
            _check_finite(np.asarray(finite)[: len(indices)], indices, labels)
            yield np.asarray(indices), np.asarray(images)[: len(indices)]
            progress.update(done)


def _check_finite(finite, indices, labels):
    if not finite.all():
        first = indices[int(np.argmin(finite))]
        raise UserError(
            f"image {first} (label {labels[first]}) is not finite: check the weights and config.sampler, or set "
            f"config.dtype='float32'"
        )


@functools.cache
def _gather(mesh):
    """Return a compiled function that replicates arrays on every device, so that every process can read them."""
    return jax.jit(lambda arrays: arrays, out_shardings=sharding.replicated(mesh))
