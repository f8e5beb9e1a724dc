"""Linear probes: what a logistic regression reads from an encoder's features, from random ones, and from pixels."""

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax import build, logs, metrics, rae

TRAIN_IMAGES = 10_000  # that a probe is fitted to
_BATCH = 250


def probes(config, parts, images, labels):
    """Accuracy of pooled tokens on uint8 images, beside those of a random-weight encoder and of raw pixels."""
    logs.say("fitting linear probes")
    encoder = build.autoencoder(config)
    size = config.data.image_size
    blank = encoder.encoder_input(jnp.zeros((1, size, size, 3)))
    random = encoder.encoder.init(jax.random.key(config.seed), blank)["params"]
    views = {
        "probe": jax.jit(lambda x: encoder.encode(parts["encoder"], x).mean((1, 2))),
        "probe_random": jax.jit(lambda x: encoder.encode(random, x).mean((1, 2))),
        "probe_pixels": lambda x: x.reshape(len(x), -1),
    }
    source = build.source(config, "train")
    chosen = np.random.default_rng(config.seed).permutation(len(source))[:TRAIN_IMAGES]
    train = [source[i] for i in chosen]
    train_images, train_labels = np.stack([e["image"] for e in train]), np.array([e["label"] for e in train])

    def features(view, images):
        batches = np.split(images, range(_BATCH, len(images), _BATCH))
        return np.concatenate([np.asarray(view(rae.to_float(batch))) for batch in batches])

    return {
        name: metrics.linear_probe(
            features(view, train_images),
            train_labels,
            features(view, images),
            labels,
            num_classes=config.data.num_classes,
        )
        for name, view in views.items()
    }
