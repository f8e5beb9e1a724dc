"""Metrics and pictures of a set of weights on held-out images."""

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax import build, generate, logs, metrics, pictures, rae, samples, sharding
from rae_jax.data import pipeline

PROBE_IMAGES = 10_000  # training images that a linear probe is fitted to
SHOWN = 10  # reconstructions in the picture
SHOWN_PER_CLASS = 8


def evaluate(config, parts, mesh):
    """Returns ({metric: number}, {name: uint8 picture}) of the weights `parts` by name.

    Reconstruction: psnr, ssim. Generation: fd against one half of the held-out images, beside fd_real of the other
    half against it; with a judge among the parts, its agreement with the requested labels, beside judge_accuracy on
    real images.
    """
    one_pass = _Pass(config, parts, mesh)
    held_out = one_pass.run(build.source(config, "heldout"))
    results = {name: float(held_out[name].mean()) for name in ("psnr", "ssim")}
    if "judge" in parts:
        results["judge_accuracy"] = float((held_out["judged"] == held_out["label"]).mean())
    if config.evaluate.probe:
        results.update(_probes(config, parts, mesh, held_out))

    half = len(held_out["label"]) // 2
    num_images = min(config.evaluate.num_images, half)
    labels = samples.labels_of("balanced", num_images, config.data.num_classes, config.seed)
    images = np.concatenate([i for _, i in generate.batches(config, parts, labels, mesh, seed=config.seed)])
    generated = one_pass.run(_Images(images, labels))

    order = np.random.default_rng(config.seed).permutation(half * 2)
    one, other = order[:num_images], order[half : half + num_images]
    real = held_out["features"]
    results["fd"] = metrics.frechet_distance(generated["features"], real[one])
    results["fd_real"] = metrics.frechet_distance(real[other], real[one])
    if "judge" in parts:
        results["agreement"] = float((generated["judged"] == labels).mean())
    return results, _pictures(config, held_out, images, labels)


def class_grid(images, labels, names, *, scale=3):
    """Picture with a row of images for each class."""
    rows = [images[labels == c][:SHOWN_PER_CLASS] for c in range(len(names))]
    columns = min(len(row) for row in rows)
    return pictures.with_captions(
        pictures.grid(np.concatenate([r[:columns] for r in rows]), columns), names, scale=scale
    )


class _Images:
    """Images in memory as a source."""

    def __init__(self, images, labels):
        self._images, self._labels = images, labels

    def __len__(self):
        return len(self._images)

    def __getitem__(self, index):
        return {"image": self._images[index], "label": np.int32(self._labels[index])}


class _Pass:
    """One pass over images: reconstructions, features and the judge's opinion of each, every image once."""

    def __init__(self, config, parts, mesh):
        self._config, self._parts, self._mesh = config, parts, mesh
        autoencoder, judge = build.autoencoder(config), build.judge(config)

        @jax.jit
        def look(parts, batch):
            images = rae.to_float(batch["image"])
            latents = autoencoder.encode(parts["encoder"], images)
            decoded = rae.to_uint8(autoencoder.decode(parts["decoder"], latents) + 0.5 / 255.0)
            judged = {}
            if "judge" in parts:
                judged["judged"] = judge.apply({"params": parts["judge"]}, images).argmax(-1)
            return {
                "image": batch["image"],
                "decoded": decoded,
                "psnr": metrics.psnr(rae.to_float(decoded), images),
                "ssim": metrics.ssim(rae.to_float(decoded), images),
                "features": latents.mean((1, 2)),
                **judged,
                "label": batch["label"],
                "mask": batch["mask"],
            }

        self._look = look

    def run(self, source):
        config = self._config
        batches = pipeline.one_pass(source, batch_size=config.evaluate.batch_size, num_threads=config.data.num_threads)
        looks = []
        with logs.Progress("look", total=len(source), unit="image") as progress:
            for batch in batches:
                looks.append(jax.device_get(self._look(self._parts, sharding.put_batch(batch, self._mesh))))
                progress.update(min(len(looks) * config.evaluate.batch_size, len(source)))
        joined = {name: np.concatenate([look[name] for look in looks]) for name in looks[0]}
        return {name: value[joined["mask"] > 0] for name, value in joined.items()}


def _probes(config, parts, mesh, held_out):
    """Linear probe accuracy of pooled tokens, beside those of a random-weight encoder and of raw pixels."""
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
    chosen = np.random.default_rng(config.seed).permutation(len(source))[:PROBE_IMAGES]
    train = [source[i] for i in chosen]
    images, labels = np.stack([e["image"] for e in train]), np.array([e["label"] for e in train])

    def features(view, images):
        return np.concatenate(
            [np.asarray(view(rae.to_float(b))) for b in np.split(images, range(250, len(images), 250))]
        )

    return {
        name: metrics.linear_probe(
            features(view, images),
            labels,
            features(view, held_out["image"]),
            held_out["label"],
            num_classes=config.data.num_classes,
        )
        for name, view in views.items()
    }


def _pictures(config, held_out, images, labels):
    names = build.source(config, "heldout").class_names
    chosen = [np.flatnonzero(held_out["label"] == c)[0] for c in range(len(names))][:SHOWN]
    pairs = np.concatenate([held_out["image"][chosen], held_out["decoded"][chosen]])
    reconstructions = pictures.with_captions(pictures.grid(pairs, len(chosen)), ("held-out", "decoded"), scale=3)
    return {"reconstructions": reconstructions, "samples": class_grid(images, labels, names)}
