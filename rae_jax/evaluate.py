"""Metrics and pictures of a set of weights on held-out images."""

import jax
import jax.numpy as jnp
import numpy as np

from rae_jax import build, generate, logs, metrics, perception, pictures, rae, reconstruct, samples

PROBE_IMAGES = 10_000  # training images that a linear probe is fitted to
SHOWN = 10  # reconstructions in the picture


def evaluate(config, parts, mesh):
    """Returns ({metric: number}, {name: uint8 picture}) of the weights `parts` by name.

    Reconstruction: psnr, ssim; lpips and rfid where their networks are among the parts. Generation, where a DiT is: fd
    against one half of the held-out images, beside fd_real of the other half against it; with a judge, its agreement
    with the requested labels, beside judge_accuracy on real images.
    """
    one_pass = _Pass(config, parts, mesh)
    held_out = one_pass.run(build.source(config, "heldout"))
    results = {name: float(held_out[name].mean()) for name in ("psnr", "ssim", "lpips") if name in held_out}
    results.update(one_pass.moments.rfid())
    if "judge" in parts:
        results["judge_accuracy"] = float((held_out["judged"] == held_out["label"]).mean())
    if config.evaluate.probe:
        results.update(_probes(config, parts, mesh, held_out))
    shown = {"reconstructions": _reconstructions(config, held_out)}
    if "dit" not in parts:
        return results, shown

    half = len(held_out["label"]) // 2
    num_images = min(config.evaluate.num_images, half)
    labels = samples.labels_of("balanced", num_images, config.data.num_classes, config.seed)
    images = np.concatenate([i for _, i in generate.batches(config, parts, labels, mesh, seed=config.seed)])
    generated = one_pass.run(_Images(images, labels), redraw=False)

    order = np.random.default_rng(config.seed).permutation(half * 2)
    one, other = order[:num_images], order[half : half + num_images]
    real = held_out["features"]
    reference = metrics.moments(real[one])
    results["fd"] = metrics.frechet_distance(metrics.moments(generated["features"]), reference)
    results["fd_real"] = metrics.frechet_distance(metrics.moments(real[other]), reference)
    if "judge" in parts:
        results["agreement"] = float((generated["judged"] == labels).mean())
    shown["samples"] = pictures.class_grid(images, labels, build.source(config, "heldout").class_names)
    return results, shown


class _Images:
    """Images in memory as a source."""

    def __init__(self, images, labels):
        self._images, self._labels = images, labels

    def __len__(self):
        return len(self._images)

    def __getitem__(self, index):
        return {"image": self._images[index], "label": np.int32(self._labels[index])}


class _Pass:
    """One pass over images: features and the judge's opinion of each, every image once, and reconstructions.

    `moments` are those of the images that were reconstructed.
    """

    def __init__(self, config, parts, mesh):
        self._config, self._parts, self._mesh = config, parts, mesh
        self._autoencoder, self._judge = build.autoencoder(config), build.judge(config)
        self._reconstruct = reconstruct.make(config)
        self.moments = perception.PairMoments()

    def run(self, source, *, redraw=True):
        """{name: array [N, ...]} of the source's images."""
        config = self._config
        looks = []
        for out in reconstruct.look(
            self._redraw if redraw else self._glance,
            self._parts,
            source,
            self._mesh,
            batch_size=config.evaluate.batch_size,
            num_threads=config.data.num_threads,
            name="look",
            on_error=config.data.on_error,
        ):
            self.moments.add(out)
            looks.append(out)
        return {name: np.concatenate([out[name] for out in looks]) for name in looks[0]}

    def _redraw(self, parts, batch):
        latents, redrawn = self._reconstruct(parts, batch["image"])
        return {**self._opinion(parts, batch, latents), **redrawn}

    def _glance(self, parts, batch):
        return self._opinion(parts, batch, self._autoencoder.encode(parts["encoder"], rae.to_float(batch["image"])))

    def _opinion(self, parts, batch, latents):
        judged = {}
        if "judge" in parts:
            logits = self._judge.apply({"params": parts["judge"]}, rae.to_float(batch["image"]))
            judged["judged"] = logits.argmax(-1)
        return {"image": batch["image"], "features": latents.mean((1, 2)), **judged, "label": batch["label"]}


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


def _reconstructions(config, held_out):
    names = build.source(config, "heldout").class_names
    chosen = [np.flatnonzero(held_out["label"] == c)[0] for c in range(len(names))][:SHOWN]
    pairs = np.concatenate([held_out["image"][chosen], held_out["decoded"][chosen]])
    return pictures.with_captions(pictures.grid(pairs, len(chosen)), ("held-out", "decoded"), scale=3)
