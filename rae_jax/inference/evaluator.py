"""Metrics and pictures of a set of weights on held-out images, and of images of any origin against a reference."""

import functools

import jax.numpy as jnp
import numpy as np

from rae_jax.build import data as build_data
from rae_jax.build import models
from rae_jax.data import evaluator_npz
from rae_jax.errors import UserError, prefixed
from rae_jax.inference import (
    batched,
    generate,
    image_grid,
    linear_probes,
    metrics,
    perceptual_metrics,
    reconstruct,
    sample_files,
)
from rae_jax.inference.collector import Collector
from rae_jax.models import resize
from rae_jax.models.autoencoder import to_float
from rae_jax.runtime import logs, sharding

SHOWN = 10  # reconstructions in the picture, each of another class


class Evaluator:
    """Evaluates weights, and images, by the same code, any number of times; it compiles each program once.

    Raises UserError for a config.evaluate.reference that does not exist or cannot be used.
    """

    def __init__(self, config, mesh):
        self._config, self._mesh = config, mesh
        self._autoencoder, self._classifier = models.autoencoder(config), models.classifier(config)
        self._reconstruct, self._sample = reconstruct.make(config), generate.make_sampler(config, mesh)
        self._reconstructions = batched.compiled(self._outputs_of_reconstruction, mesh)
        self._features = batched.compiled(self._outputs_of_images, mesh)
        self._reference_images, self._reference_moments = self._open_reference()
        self._reference_of = None  # the encoder's weights, and the features of the reference by them

    def weights(self, parts, *, probe=False):
        """Return ({metric: number}, {name: uint8 picture}) of the weights `parts` by name.

        Reconstruction of the held-out images: psnr, ssim; lpips and rfid with their networks among the parts;
        judge_accuracy with a judge; linear probes of the encoder with `probe`. Generation, with a DiT: as `images`.
        """
        config = self._config
        is_reference = "dit" in parts and not config.evaluate.reference
        names = ("features", "predicted", "label", *reconstruct.SCORES)
        names += ("pool",) * is_reference + ("image",) * probe
        kinds = (*perceptual_metrics.MOMENTS_OF, "decoded_pool") if is_reference else reconstruct.MOMENTS
        collector, pairs = Collector(arrays=names, moments=kinds), {}
        for out in batched.outputs(self._reconstructions, parts, self._batches(self._held_out, "reconstruct")):
            collector.add(out)
            _add_pairs(pairs, out)
        held_out = collector.arrays()
        results = {name: float(held_out[name].mean()) for name in reconstruct.SCORES if name in held_out}
        results.update(reconstruct.rfid(collector))
        if "judge" in parts:
            results["judge_accuracy"] = float((held_out["predicted"] == held_out["label"]).mean())
        if probe:
            results.update(linear_probes.probes(config, parts, held_out["image"], held_out["label"], self._mesh))
        shown = {"reconstructions": _picture(pairs)}
        if "dit" in parts:
            reference = collector if is_reference else self._reference(parts)
            generation, shown["samples"] = self._generation(parts, reference)
            results.update(generation)
        return results, shown

    def images(self, parts, path):
        """Return {metric: number} of the images at `path`, an npz's or a folder's, against config.evaluate.reference.

        fd in the space of the encoder; fid, sfid, inception_score, precision and recall with Inception among the parts;
        agreement with a judge, if the npz has labels. Without a named reference the held-out images are the reference:
        fd is then the distance to one half of them, next to fd_real of the other half. Encoder and judge see images of
        another size resized. Raises UserError for images that cannot be used.
        """
        with prefixed(f"--samples={path}"):
            source = self._open(path)
            if source is None:
                raise UserError(f"it lacks {evaluator_npz.IMAGES}, the images: uint8 [N, H, W, 3]")
        found = self._compare(parts, self._batches(source, "samples"), self._reference(parts))
        if not found:
            raise UserError(
                f"--samples={path} cannot be compared: {len(self._held_out)} held-out images are too few; name more by "
                f"config.evaluate.reference"
            )
        return found

    @functools.cached_property
    def _held_out(self):
        return build_data.source(self._config, "heldout")

    def _open_reference(self):
        """Return (source of the named reference's images or None, {kind: Gaussian} of the moments that it holds)."""
        path = self._config.evaluate.reference
        if not path:
            return None, {}
        with prefixed(f"config.evaluate.reference={path}"):
            images = self._open(path, labelled=False)
            moments = evaluator_npz.read_moments(path, perceptual_metrics.MOMENTS_OF)
            if images is None and not moments:
                raise UserError(f"it holds neither images ({evaluator_npz.IMAGES}) nor moments (mu and sigma)")
            if images is None and not self._config.evaluate.inception:
                raise UserError("it holds no images, and its moments need config.evaluate.inception: name that as well")
        return images, {kind: metrics.Gaussian(*of) for kind, of in moments.items()}

    def _open(self, path, *, labelled=True):
        """Return the source of the images at `path`, None for an npz without images; report a size that is resized."""
        size = self._config.data.image_size
        source = evaluator_npz.open_images(path, size, labelled=labelled)
        if source is not None and len(source) < 2:
            raise UserError("it holds a single image: a distribution needs two or more")
        if source is not None and source.sides != (size, size):
            height, width = source.sides
            logs.say(f"{path}: {height}x{width} px, which the encoder and the judge see resized to {size}x{size}")
        return source

    def _reference(self, parts):
        """Return the Collector of the reference; the same encoder sees it once."""
        if self._reference_of is None or self._reference_of[0] is not parts["encoder"]:
            self._reference_of = parts["encoder"], self._collect_reference(parts)
        return self._reference_of[1]

    def _collect_reference(self, parts):
        source = self._reference_images if self._config.evaluate.reference else self._held_out
        collector = Collector(arrays=("features", "pool"), moments=perceptual_metrics.MOMENTS_OF)
        if source is not None:
            for out in batched.outputs(self._features, parts, self._batches(source, "reference")):
                collector.add(out)
        collector.moments.update(self._reference_moments)
        return collector

    def _generation(self, parts, reference):
        """Return ({metric: number}, picture) of images that are generated here, the same number of each class."""
        config = self._config
        labels = sample_files.labels_of("balanced", config.evaluate.num_images, config.data.num_classes, config.seed)
        shown = dict.fromkeys(image_grid.chosen(labels).tolist())
        results = self._compare(parts, self._generated(parts, labels, shown), reference)
        picture = image_grid.overview(np.stack(list(shown.values())), labels[list(shown)], self._held_out.class_names)
        return results, picture

    def _generated(self, parts, labels, shown):
        """Yield batches on the devices of images for the labels; fill in `shown`, {index: None}, with these images."""
        how, size = {"batch_size": self._config.evaluate.batch_size, "seed": self._config.seed}, 0
        for indices, images in generate.batches(self._sample, parts, labels, self._mesh, **how):
            shown.update({i: images[n].copy() for n, i in enumerate(indices.tolist()) if i in shown})
            size = max(size, sharding.round_up(len(images), self._mesh))
            rows = np.arange(size) % len(images)
            mask = (np.arange(size) < len(images)).astype(np.float32)
            batch = {"image": images[rows], "label": labels[indices][rows].astype(np.int32), "mask": mask}
            yield sharding.put_global(batch, self._mesh)

    def _compare(self, parts, batches, reference):
        """Return {metric: number} of the images in batches on the devices against the Collector of a reference."""
        names = ("features", "predicted", "label", "pool", "logits")
        collector = Collector(arrays=names, moments=perceptual_metrics.MOMENTS_OF)
        for out in batched.outputs(self._features, parts, batches):
            collector.add(out)
        found, features = collector.arrays(), reference.arrays().get("features")
        results = {} if features is None else self._fd(found["features"], features)
        if "inception" in parts:
            results.update(perceptual_metrics.compare_sets(collector, reference))
        if "predicted" in found and "label" in found:
            results["agreement"] = float((found["predicted"] == found["label"]).mean())
        return results

    def _fd(self, found, reference):
        """Return the distance to the named reference; or to one half of the held-out images, and fd_real of the other.

        fd and fd_real take the same number of images from all three sets: a distance of fewer images would be larger.
        """
        if self._config.evaluate.reference:
            return perceptual_metrics.frechet("fd", metrics.moments(found), metrics.moments(reference))
        half = len(reference) // 2
        count = min(len(found), half)
        if count < 2:
            return {}
        rng = np.random.default_rng(self._config.seed)
        order = rng.permutation(half * 2)
        one, other = (metrics.moments(reference[order[start : start + count]]) for start in (0, half))
        found = found[rng.permutation(len(found))[:count]] if len(found) > count else found
        return {
            **perceptual_metrics.frechet("fd", metrics.moments(found), one),
            **perceptual_metrics.frechet("fd_real", other, one),
        }

    def _batches(self, source, name):
        reading = {key: self._config.data[key] for key in ("num_threads", "on_error")}
        return batched.batches(source, self._mesh, batch_size=self._config.evaluate.batch_size, name=name, **reading)

    def _outputs_of_reconstruction(self, parts, batch):
        """Return the outputs of held-out images and of their reconstructions."""
        latents, outputs = self._reconstruct(parts, batch["image"])
        seen = self._features_and_class(parts, to_float(batch["image"]), latents)
        return {"image": batch["image"], "label": batch["label"], **seen, **outputs}

    def _outputs_of_images(self, parts, batch):
        """Return the features of images; Inception sees them at their own size, as in ADM's evaluator."""
        images = to_float(batch["image"])
        out = {"label": batch["label"]} if "label" in batch else {}
        if "inception" in parts:
            out.update(perceptual_metrics.features(parts["inception"], images))
        size = self._config.data.image_size
        if images.shape[1:3] != (size, size):
            images = jnp.clip(resize.bicubic(images, size, size, antialias=True), 0.0, 1.0)
        return {**out, **self._features_and_class(parts, images, self._autoencoder.encode(parts["encoder"], images))}

    def _features_and_class(self, parts, images, latents):
        features = {"features": latents.mean((1, 2))}
        if "judge" not in parts:
            return features
        return {**features, "predicted": self._classifier.apply({"params": parts["judge"]}, images).argmax(-1)}


def _add_pairs(pairs, out):
    """Add the first pair of each class to {class: (image, reconstruction)}."""
    for i, label in enumerate(out["label"].tolist()):
        if label not in pairs and len(pairs) < SHOWN:
            pairs[label] = (out["image"][i].copy(), out["decoded"][i].copy())


def _picture(pairs):
    rows = zip(*(pairs[label] for label in sorted(pairs)), strict=True)
    picture = image_grid.grid(np.concatenate([np.stack(row) for row in rows]), len(pairs))
    return image_grid.with_captions(picture, ("held-out", "decoded"), scale=3)
