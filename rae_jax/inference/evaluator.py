"""Metrics and pictures of weights on held-out images; metrics of images of any origin compared with a reference."""

import functools
import os

import jax.numpy as jnp
import numpy as np

from rae_jax.build import data as build_data
from rae_jax.build import models
from rae_jax.config.keys import generator
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

SHOWN = 10  # reconstructions in the picture, one of each class


class Evaluator:
    """Evaluates weights and files of images by the same code. Each program is compiled once for all evaluations.

    Raises UserError if config.evaluate.reference does not exist or cannot be used.
    """

    def __init__(self, config, mesh):
        self._config, self._mesh = config, mesh
        self._autoencoder, self._classifier = models.autoencoder(config), models.classifier(config)
        self._reconstruct, self._sample = reconstruct.make(config), generate.make_sampler(config, mesh)
        self._reconstructions = batched.compiled(self._outputs_of_reconstruction, mesh)
        self._features = batched.compiled(self._outputs_of_images, mesh)
        self._reference_images, self._reference_moments = self._open_reference()
        self._cached_reference = None  # (weights of an encoder, Collector of the reference)

    def weights(self, parts, *, probe=False):
        """Return ({metric: number}, {name: uint8 picture}) of the weights `parts`, {name: params}.

        Metrics of the reconstructed held-out images: psnr, ssim; lpips and rfid if their networks are among the parts;
        judge_accuracy if a judge is among the parts; with `probe`, linear probes of the encoder; both only if the
        held-out images have labels. If the generator is among the parts, also the metrics of `images` for images that
        it generates.
        """
        config = self._config
        generates = generator(config) in parts
        is_reference = generates and not config.evaluate.reference
        names = ("features", "predicted", "label", *reconstruct.SCORES)
        names += ("pool",) * is_reference + ("image",) * probe
        moments = (*perceptual_metrics.MOMENTS_OF, "decoded_pool") if is_reference else reconstruct.MOMENTS
        collector, pairs = Collector(arrays=names, moments=moments), {}
        for out in batched.outputs(self._reconstructions, parts, self._batches(self._held_out, "reconstruct")):
            collector.add(out)
            _add_pairs(pairs, out)
        labels = collector.array("label")
        results = {**reconstruct.mean_scores(collector), **reconstruct.rfid(collector)}
        if "judge" in parts and labels is not None:
            results["judge_accuracy"] = float((collector.array("predicted") == labels).mean())
        if probe and labels is not None:
            results.update(linear_probes.probes(config, parts, collector.array("image"), labels, self._mesh))
        pictures = {"reconstructions": _picture(pairs)}
        if generates:
            reference = collector if is_reference else self._reference(parts)
            generation, pictures["samples"] = self._generation(parts, reference)
            results.update(generation)
        return results, pictures

    def images(self, parts, path):
        """Return {metric: number} of the images at `path` (npz or folder), compared with config.evaluate.reference.

        fd of the encoder's features; fid, sfid, inception_score, precision and recall if Inception is among the parts;
        agreement if a judge is among the parts and the npz has labels. Without config.evaluate.reference the held-out
        images are the reference: fd is the distance to one half of them, fd_real the distance between both halves.
        Images of another size are resized for encoder and judge. Raises UserError for images that cannot be used.
        """
        with prefixed(f"--samples={path}"):
            source = self._open(path)
            if source is None:
                raise UserError(f"it lacks {evaluator_npz.IMAGES}: store the images, uint8 [N, H, W, 3], by this name")
        found = self._compare(parts, self._batches(source, "samples"), self._reference(parts))
        if not found:
            raise UserError(
                f"--samples={path} cannot be compared: {len(self._held_out)} held-out images are too few; set "
                f"config.evaluate.reference to more images"
            )
        return found

    @functools.cached_property
    def _held_out(self):
        source = build_data.source(self._config, "heldout")
        if not source.labelled:
            logs.say("the held-out images have no labels: judge_accuracy and linear probes are left out (docs/data.md)")
        return source

    def _open_reference(self):
        """Return (source of the reference's images or None, {name: Gaussian} of the moments that it holds)."""
        path = os.path.expanduser(self._config.evaluate.reference)
        if not path:
            return None, {}
        with prefixed(f"config.evaluate.reference={path}"):
            images = self._open(path, labelled=False)
            moments = evaluator_npz.read_moments(path, perceptual_metrics.MOMENTS_OF)
            if images is None and not moments:
                raise UserError(
                    f"it holds neither images ({evaluator_npz.IMAGES}) nor moments (mu and sigma): name another file"
                )
            if images is None and not self._config.evaluate.inception:
                raise UserError("it holds no images, and its moments need config.evaluate.inception: set this key")
        return images, {name: metrics.Gaussian(*values) for name, values in moments.items()}

    def _open(self, path, *, labelled=True):
        """Return the source of the images at `path`, or None for an npz without images; log a size that is resized."""
        size = self._config.data.image_size
        source = evaluator_npz.open_images(path, size, labelled=labelled)
        if source is not None and len(source) < 2:
            raise UserError("it holds a single image: name at least two images")
        if source is not None and source.sides != (size, size):
            height, width = source.sides
            logs.say(f"{path}: images of {height}x{width} px are resized to {size}x{size} for encoder and judge")
        return source

    def _reference(self, parts):
        """Return the Collector of the reference; it is computed again only if the encoder's weights are others."""
        if self._cached_reference is None or self._cached_reference[0] is not parts["encoder"]:
            self._cached_reference = parts["encoder"], self._collect_reference(parts)
        return self._cached_reference[1]

    def _collect_reference(self, parts):
        source = self._reference_images if self._config.evaluate.reference else self._held_out
        collector = Collector(arrays=("features", "pool"), moments=perceptual_metrics.MOMENTS_OF)
        if source is not None:
            for out in batched.outputs(self._features, parts, self._batches(source, "reference")):
                collector.add(out)
        collector.moments.update(self._reference_moments)
        return collector

    def _generation(self, parts, reference):
        """Return ({metric: number}, picture) of generated images, the same number of each class."""
        config = self._config
        labels = sample_files.labels_of("balanced", config.evaluate.num_images, config.data.num_classes, config.seed)
        kept = dict.fromkeys(image_grid.chosen(labels).tolist())
        results = self._compare(parts, self._generated(parts, labels, kept), reference)
        picture = image_grid.overview(np.stack(list(kept.values())), labels[list(kept)], self._held_out.class_names)
        return results, picture

    def _generated(self, parts, labels, kept):
        """Yield batches of generated images on the devices; store the images of the indices `kept`, {index: None}."""
        batch_size = sharding.even_batch(len(labels), self._config.evaluate.batch_size, self._mesh)
        settings, size = {"batch_size": batch_size, "seed": self._config.seed}, 0
        for indices, images in generate.batches(self._sample, parts, labels, self._mesh, **settings):
            kept.update({i: images[n].copy() for n, i in enumerate(indices.tolist()) if i in kept})
            size = max(size, sharding.round_up(len(images), self._mesh))
            rows = np.arange(size) % len(images)
            mask = (np.arange(size) < len(images)).astype(np.float32)
            batch = {"image": images[rows], "label": labels[indices][rows].astype(np.int32), "mask": mask}
            yield sharding.put_global(batch, self._mesh)

    def _compare(self, parts, batches, reference):
        """Return {metric: number} of images in batches on the devices, compared with the Collector of a reference."""
        names = ("features", "predicted", "label", "pool", "logits")
        collector = Collector(arrays=names, moments=perceptual_metrics.MOMENTS_OF)
        for out in batched.outputs(self._features, parts, batches):
            collector.add(out)
        features = reference.array("features")
        results = {} if features is None else self._fd(collector.array("features"), features)
        if "inception" in parts:
            results.update(perceptual_metrics.compare_sets(collector, reference))
        predicted, labels = collector.array("predicted"), collector.array("label")
        if predicted is not None and labels is not None:
            results["agreement"] = float((predicted == labels).mean())
        return results

    def _fd(self, found, reference):
        """Return {'fd': distance to config.evaluate.reference}.

        Without it, 'fd' to one half of the held-out images, and 'fd_real' between both halves. These two take the same
        number of images from all three sets, because a distance of fewer images is larger.
        """
        if self._config.evaluate.reference:
            return perceptual_metrics.frechet("fd", metrics.moments(found), metrics.moments(reference))
        half = len(reference) // 2
        count = min(len(found), half)
        if count < 2:
            return {}
        rng = np.random.default_rng(self._config.seed)
        order = rng.permutation(half * 2)
        first, second = (metrics.moments(reference[order[start : start + count]]) for start in (0, half))
        found = found[rng.permutation(len(found))[:count]] if len(found) > count else found
        return {
            **perceptual_metrics.frechet("fd", metrics.moments(found), first),
            **perceptual_metrics.frechet("fd_real", second, first),
        }

    def _batches(self, source, name):
        reading = {key: self._config.data[key] for key in ("num_threads", "on_error")}
        return batched.batches(source, self._mesh, batch_size=self._config.evaluate.batch_size, name=name, **reading)

    def _outputs_of_reconstruction(self, parts, batch):
        """Return the outputs of held-out images and of their reconstructions."""
        latents, outputs = self._reconstruct(parts, batch["image"])
        features = self._features_and_class(parts, to_float(batch["image"]), latents)
        label = {"label": batch["label"]} if "label" in batch else {}
        return {"image": batch["image"], **label, **features, **outputs}

    def _outputs_of_images(self, parts, batch):
        """Return the features of images; Inception takes images at their own size, as in ADM's evaluator."""
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
    """Add the first pair of each class to {class: (image, reconstruction)}; without labels, the first pairs."""
    labels = out["label"].tolist() if "label" in out else range(len(pairs), len(pairs) + len(out["image"]))
    for i, label in enumerate(labels):
        if label not in pairs and len(pairs) < SHOWN:
            pairs[label] = (out["image"][i].copy(), out["decoded"][i].copy())


def _picture(pairs):
    rows = zip(*(pairs[label] for label in sorted(pairs)), strict=True)
    picture = image_grid.grid(np.concatenate([np.stack(row) for row in rows]), len(pairs))
    return image_grid.with_captions(picture, ("held-out", "decoded"), scale=3)
