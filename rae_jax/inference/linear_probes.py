"""Linear probes: what a logistic regression reads from an encoder's features, from random ones, and from pixels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax.build import data as build_data
from rae_jax.build import models
from rae_jax.data import pipeline
from rae_jax.errors import UserError
from rae_jax.inference import metrics
from rae_jax.models.autoencoder import to_float
from rae_jax.runtime import logs, sharding

TRAIN_IMAGES = 10_000  # that a probe is fitted to
PIXELS_UP_TO = 64  # pixels a side: a probe of larger images themselves would take tens of gigabytes
_BATCH = 250


def probes(config, parts, images, labels, mesh):
    """Accuracy of pooled tokens on uint8 images, beside a random encoder's and, of small images, raw pixels'."""
    logs.say("fitting linear probes")
    source = _source(config)
    chosen = np.random.default_rng(config.seed).permutation(len(source))[:TRAIN_IMAGES]
    train_images, train_labels = _read(Chosen(source, chosen), config.data)
    encoder = models.autoencoder(config)
    size = config.data.image_size
    blank = encoder.encoder_input(jnp.zeros((1, size, size, 3)))
    random = encoder.encoder.init(jax.random.key(config.seed), blank)["params"]
    on_all = sharding.replicated(mesh)  # so that every process can read it
    pooled = jax.jit(lambda params, x: encoder.encode(params, x).mean((1, 2)), out_shardings=on_all)
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
    """Raise UserError where probes are asked for, and the training images are not packed as they would see them."""
    if config.evaluate.probe:
        try:
            _source(config)
        except UserError as error:
            raise UserError(f"{error}; or evaluate without probes: --config.evaluate.probe=False") from error


def _source(config):
    """The training images, cut as held-out ones are."""
    return build_data.source(config, "train", crop="centre")


class Chosen:
    """Some examples of a source."""

    def __init__(self, source, indices):
        self._source, self._indices = source, indices

    def __len__(self):
        return len(self._indices)

    def __getitem__(self, index):
        return self._source[self._indices[index]]


def _read(source, data):
    """Images and labels of a source; what cannot be read stops or is left out, as everywhere."""
    reading = {"num_threads": data.num_threads, "on_error": data.on_error}
    batches = []
    with logs.Progress("read for the probes", total=len(source), unit="image") as progress:
        for batch in pipeline.one_pass(source, batch_size=_BATCH, **reading):
            batches.append(batch)
            progress.update(min(len(batches) * _BATCH, len(source)))
    there = np.concatenate([batch["mask"] for batch in batches]) > 0
    return tuple(np.concatenate([batch[key] for batch in batches])[there] for key in ("image", "label"))
