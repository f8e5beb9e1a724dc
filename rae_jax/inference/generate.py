"""From labels to images: noise, guided trajectory, decoder. One compiled program, any number of images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax.build import models
from rae_jax.build import sampler as sampler_lib
from rae_jax.diffusion import flow
from rae_jax.models.autoencoder import denormalise, to_uint8
from rae_jax.models.dit import in_dtype
from rae_jax.runtime import logs, sharding


def make_sampler(config, mesh):
    """`sampler`, compiled for a mesh."""
    return sharding.jit(sampler(config), mesh)


def sampler(config):
    """Returns pure (parts, key, indices [B], labels [B]) -> uint8 images [B, H, W, 3].

    Everything random about image i is a function of (key, i) alone. `parts` has 'guide', the weak model's weights,
    where the guidance is AutoGuidance.
    """
    autoencoder = models.autoencoder(config)

    def sample(parts, key, indices, labels):
        latents = draw(config, parts, key, indices, labels)
        return to_uint8(autoencoder.decode(parts["decoder"], latents))

    return sample


def draw(config, parts, key, indices, labels, *, scale=None):
    """Latents [B, h, w, D] as the decoder takes them, for indices and labels [B]; pure. `scale`: config's guidance's.

    `parts` are the DiT, its statistics, and 'guide' where the guidance is AutoGuidance.
    """
    shape = models.latent_shape(config)
    keys = _keys(key, indices)

    def noise_fn(n):
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, n), shape))(keys)

    halves = _guided(config, parts, labels, scale)
    latents = sampler_lib.solve(config, halves, first_noise(config, key, indices), times(config), noise_fn)
    return denormalise(latents, parts["statistics"])


def times(config):
    """The sampler's times, from noise to data: numbers, also while others compile, so that steps can be told apart."""
    with jax.ensure_compile_time_eval():
        return sampler_lib.times(config, sampler_lib.shift_factor(config))


def first_noise(config, key, indices):
    """What the images [B] are made of, [B, h, w, D]."""
    shape = models.latent_shape(config)
    return jax.vmap(lambda key: jax.random.normal(key, shape))(_keys(key, indices))


def _keys(key, indices):
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)


def euler_step(config, parts, x, t, t_next, labels, scale):
    """(x at the time t_next, the data that the DiT sees in x [B, h, w, D] at t, as latents that the decoder takes)."""
    condition_fn, velocity_fn = _guided(config, parts, labels, scale)
    all_t = jnp.full(x.shape[:1], t)
    v = velocity_fn(x, all_t, condition_fn(x, all_t))
    seen = flow.data_of(v, x, all_t, sampler_lib.path(config))
    return x + (t_next - t) * v, denormalise(seen, parts["statistics"])


def batches(sample, parts, labels, mesh, *, batch_size, seed, present=frozenset()):
    """Yield (indices [<= B], uint8 images [<= B, H, W, 3]) for the labels [N]; a batch is computed ahead of its use.

    `sample` is what make_sampler made. Batches whose indices are all among `present` are left out; the others stay what
    they are.
    """
    key, gather = jax.random.key(seed), _gather(mesh)
    size = sharding.even_batch(len(labels), batch_size, mesh)
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
            images = ahead
            if n + 1 < len(wanted):
                ahead = compute(wanted[n + 1])
            done += len(indices)
            yield np.asarray(indices), np.asarray(images)[: len(indices)]
            progress.update(done)


@functools.cache
def _gather(mesh):
    """Compiled: all of a batch on every device, so that every process can read it."""
    return jax.jit(lambda images: images, out_shardings=sharding.replicated(mesh))


def _guided(config, parts, labels, scale=None):
    """(condition_fn, velocity_fn) of the DiT for these labels under the config's guidance, of that scale if given."""
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
    return sampler_lib.guided(config, strong, weak, scale)


def _halves(config, sizes, params, labels):
    """(condition_fn, velocity_fn): trunk and head of a DiT^DH of those sizes; a plain DiT is all in the latter."""
    dit, to_velocity = models.dit(config, sizes), sampler_lib.to_velocity(config)
    params = {"params": in_dtype(params, config.dtype)}
    if sizes.head_depth == 0:
        return lambda x, t: (), lambda x, t, s: to_velocity(dit.apply(params, x, t, labels), x, t)

    def condition_fn(x, t):
        return dit.apply(params, x, t, labels, method="condition")

    def velocity_fn(x, t, s):
        return to_velocity(dit.apply(params, x, t, s, method="velocity"), x, t)

    return condition_fn, velocity_fn
