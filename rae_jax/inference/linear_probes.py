"""Linear probes: logistic regression on an encoder's features, on a random encoder's features, and on pixels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax.build import data as build_data
from rae_jax.build import models
from rae_jax.data import pipeline
from rae_jax.errors import UserError
from rae_jax.inference import generate, metrics
from rae_jax.models.autoencoder import to_float
from rae_jax.runtime import logs, sharding

TRAIN_IMAGES = 10_000  # to which a probe is fitted
PIXELS_UP_TO = 64  # pixels a side: a probe on the pixels of larger images would take tens of gigabytes
_BATCH = 250


def probes(config, parts, images, labels, mesh):
    """Return {name: accuracy} on uint8 `images`, [N, H, W, 3], of probes fitted to training images.

    'probe' takes the pooled tokens of the encoder, 'probe_random' of a random encoder, 'probe_pixels' (only for small
    images) the pixels.
    """
    logs.say("fitting linear probes")
    source = _source(config)
    indices = np.random.default_rng(config.seed).permutation(len(source))[:TRAIN_IMAGES]
    train_images, train_labels = _read_all(Subset(source, indices), config.data)
    encoder = models.autoencoder(config)
    size = config.data.image_size
    blank = encoder.encoder_input(jnp.zeros((1, size, size, 3), jnp.float32))
    random = encoder.encoder.init(generate.random_key(config.seed), blank)["params"]
    replicated = sharding.replicated(mesh)  # so that every process can read the features
    pooled = jax.jit(lambda params, x: encoder.encode(params, x).mean((1, 2)), out_shardings=replicated)
    random = jax.device_put(random, sharding.shardings(random, mesh))
    views = {
        "probe": functools.partial(pooled, parts["encoder"]),
        "probe_random": functools.partial(pooled, random),
    }
    if size <= PIXELS_UP_TO:
        views["probe_pixels"] = lambda x: x.reshape(len(x), -1)

    def features(name, view, images):
        batches, found = np.split(images, range(_BATCH, len(images), _BATCH)), []
        with logs.Progress(name, total=len(images), unit="image") as progress:
            for batch in batches:
                found.append(np.asarray(view(to_float(batch))))
                progress.update(sum(map(len, found)))
        return np.concatenate(found)

    return {
        name: metrics.linear_probe(
            features(name, view, train_images),
            train_labels,
            features(name, view, images),
            labels,
            num_classes=config.data.num_classes,
        )
        for name, view in views.items()
    }


def check_available(config):
    """Raise UserError if config.evaluate.probe is set and the training images cannot be had centre-cropped."""
    if config.evaluate.probe:
        try:
            _source(config)
        except UserError as error:
            raise UserError(f"{error}; or evaluate without probes: --config.evaluate.probe=False") from error


def _source(config):
    """Return the source of training images, centre-cropped as held-out images are."""
    return build_data.source(config, "train", crop="centre")


class Subset:
    """The examples of a source with the given indices."""

    def __init__(self, source, indices):
        self._source, self._indices = source, indices

    def __len__(self):
        return len(self._indices)

    def __getitem__(self, index):
        return self._source[self._indices[index]]


def _read_all(source, data):
    """Return (images, labels) of a source. An image that cannot be read raises or is left out: config.data.on_error."""
    reading = {"num_threads": data.num_threads, "on_error": data.on_error}
    batches = []
    with logs.Progress("read images for probes", total=len(source), unit="image") as progress:
        for batch in pipeline.one_pass(source, batch_size=_BATCH, **reading):
            batches.append(batch)
            progress.update(min(len(batches) * _BATCH, len(source)))
    is_read = np.concatenate([batch["mask"] for batch in batches]) > 0
    return tuple(np.concatenate([batch[key] for batch in batches])[is_read] for key in ("image", "label"))
