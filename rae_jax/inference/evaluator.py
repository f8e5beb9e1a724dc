"""Metrics and pictures of a set of weights on held-out images, and of images of any origin against a reference."""

import contextlib
import functools

import jax.numpy as jnp
import numpy as np

from rae_jax.build import models
from rae_jax.data import evaluator_npz
from rae_jax.errors import UserError
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
from rae_jax.models import resize
from rae_jax.models.autoencoder import to_float
from rae_jax.runtime import logs, sharding

SHOWN = 10  # reconstructions in the picture, each of another class


class Evaluator:
    """Evaluates weights, and images, by the same code, as often as wanted; what it compiles, it compiles once.

    Raises UserError for a config.evaluate.reference that is not there or not usable.
    """

    def __init__(self, config, mesh):
        self._config, self._mesh = config, mesh
        self._autoencoder, self._judge = models.autoencoder(config), models.judge(config)
        self._reconstruct, self._sample = reconstruct.make(config), generate.make_sampler(config, mesh)
        self._redraw, self._glance = (batched.compiled(view, mesh) for view in (self._redraw_view, self._glance_view))
        self._images, self._moments = self._open_reference()
        self._known = None  # the encoder's weights, and what was seen of the reference with them

    def weights(self, parts, *, probe=False):
        """({metric: number}, {name: uint8 picture}) of the weights `parts` by name.

        Reconstruction of the held-out images: psnr, ssim; lpips and rfid where their networks are among the parts;
        judge_accuracy, with a judge; linear probes of the encoder, if asked for. Generation, with a DiT: as `images`.
        """
        config = self._config
        is_reference = "dit" in parts and not config.evaluate.reference
        moments, pairs = reconstruct.PairMoments(as_reference=is_reference), {}
        kept = _Kept("features", "judged", "label", "psnr", "ssim", "lpips", *(("image",) if probe else ()))
        for out in batched.look(self._redraw, parts, self._batches(self._held_out, "look")):
            moments.add(out)
            kept.add(out)
            _add_pairs(pairs, out)
        held_out = kept.arrays()
        results = {name: float(held_out[name].mean()) for name in ("psnr", "ssim", "lpips") if name in held_out}
        results.update(moments.rfid())
        if "judge" in parts:
            results["judge_accuracy"] = float((held_out["judged"] == held_out["label"]).mean())
        if probe:
            results.update(linear_probes.probes(config, parts, held_out["image"], held_out["label"], self._mesh))
        shown = {"reconstructions": _picture(pairs)}
        if "dit" in parts:
            reference = (moments.given, held_out["features"]) if is_reference else self._reference(parts)
            generation, shown["samples"] = self._generation(parts, reference)
            results.update(generation)
        return results, shown

    def images(self, parts, path):
        """{metric: number} of the images at `path`, an npz's or a folder's, against config.evaluate.reference.

        fd in the space of the encoder; fid, sfid, inception_score, precision and recall with Inception among the parts;
        agreement with a judge, where the npz has labels. Held-out images are the reference where none is named; fd is
        then that to one half of them, beside fd_real of the other half to it. The encoder and the judge see images of
        another size resized. Raises UserError for images that are not usable.
        """
        with _naming(f"--samples={path}"):
            source = self._open(path)
            if source is None:
                raise UserError(f"it lacks {evaluator_npz.IMAGES}, the images: uint8 [N, H, W, 3]")
        found = self._compared(parts, self._batches(source, "samples"), self._reference(parts))
        if not found:
            raise UserError(
                f"--samples={path} has nothing to be compared with, as {len(self._held_out)} held-out images are too "
                f"few: name more by config.evaluate.reference"
            )
        return found

    @functools.cached_property
    def _held_out(self):
        return models.source(self._config, "heldout")

    def _open_reference(self):
        """(Source of the named reference's images or None, {kind: Gaussian} of the moments that it holds)."""
        path = self._config.evaluate.reference
        if not path:
            return None, {}
        with _naming(f"config.evaluate.reference={path}"):
            images = self._open(path, labelled=False)
            moments = evaluator_npz.read_moments(path, perceptual_metrics.MOMENTS_OF)
            if images is None and not moments:
                raise UserError(f"it holds neither images ({evaluator_npz.IMAGES}) nor moments (mu and sigma)")
            if images is None and not self._config.evaluate.inception:
                raise UserError("it holds no images, and its moments take config.evaluate.inception: name that as well")
        return images, {kind: metrics.Gaussian(*of) for kind, of in moments.items()}

    def _open(self, path, *, labelled=True):
        """Source of the images at `path`, None for an npz without; says so where they are resized for some networks."""
        size = self._config.data.image_size
        source = evaluator_npz.open_images(path, size, labelled=labelled)
        if source is not None and len(source) < 2:
            raise UserError("it holds a single image: two and more have a distribution to compare")
        if source is not None and source.sides != (size, size):
            height, width = source.sides
            logs.say(f"{path}: {height}x{width} px, which the encoder and the judge see resized to {size}x{size}")
        return source

    def _reference(self, parts):
        """(What Inception sees, the encoder's features) of the reference; the latter None where it has no images."""
        if self._known is None or self._known[0] is not parts["encoder"]:
            self._known = parts["encoder"], self._look_at_reference(parts)
        return self._known[1]

    def _look_at_reference(self, parts):
        source = self._images if self._config.evaluate.reference else self._held_out
        seen, kept = perceptual_metrics.Seen(keep=("pool",)), _Kept("features")
        if source is not None:
            for out in batched.look(self._glance, parts, self._batches(source, "reference")):
                seen.add(out.get("seen", {}))
                kept.add(out)
        seen.moments.update(self._moments)
        return seen, kept.arrays().get("features")

    def _generation(self, parts, reference):
        """({metric: number}, picture) of images that are drawn for it, as many of each class."""
        config = self._config
        labels = sample_files.labels_of("balanced", config.evaluate.num_images, config.data.num_classes, config.seed)
        shown = dict.fromkeys(image_grid.chosen(labels).tolist())
        results = self._compared(parts, self._drawn(parts, labels, shown), reference)
        picture = image_grid.overview(np.stack(list(shown.values())), labels[list(shown)], self._held_out.class_names)
        return results, picture

    def _drawn(self, parts, labels, shown):
        """Batches on the devices of images for the labels; those whose indices are in `shown` are left there."""
        how, size = {"batch_size": self._config.evaluate.batch_size, "seed": self._config.seed}, 0
        for indices, images in generate.batches(self._sample, parts, labels, self._mesh, **how):
            shown.update({i: images[n].copy() for n, i in enumerate(indices.tolist()) if i in shown})
            size = max(size, sharding.round_up(len(images), self._mesh))
            rows = np.arange(size) % len(images)
            mask = (np.arange(size) < len(images)).astype(np.float32)
            batch = {"image": images[rows], "label": labels[indices][rows].astype(np.int32), "mask": mask}
            yield sharding.put_global(batch, self._mesh)

    def _compared(self, parts, batches, reference):
        """{metric: number} of the images in batches on the devices against a reference."""
        seen, kept = perceptual_metrics.Seen(keep=("pool", "logits")), _Kept("features", "judged", "label")
        for out in batched.look(self._glance, parts, batches):
            seen.add(out.get("seen", {}))
            kept.add(out)
        found, (reference_seen, features) = kept.arrays(), reference
        results = {} if features is None else self._fd(found["features"], features)
        if "inception" in parts:
            results.update(perceptual_metrics.compare_sets(seen, reference_seen))
        if "judged" in found and "label" in found:
            results["agreement"] = float((found["judged"] == found["label"]).mean())
        return results

    def _fd(self, found, reference):
        """Distance to the named reference; or to one half of the held-out images, beside that of the other half.

        The latter two are of as many images, all three sets: a distance of fewer would be larger.
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

    def _redraw_view(self, parts, batch):
        """Everything about held-out images and their reconstructions."""
        latents, redrawn = self._reconstruct(parts, batch["image"])
        opinion = self._opinion(parts, to_float(batch["image"]), latents)
        return {"image": batch["image"], "label": batch["label"], **opinion, **redrawn}

    def _glance_view(self, parts, batch):
        """Features of images and, with a judge, its opinion; Inception sees them at their own size, as ADM's does."""
        images = to_float(batch["image"])
        out = {"label": batch["label"]} if "label" in batch else {}
        if "inception" in parts:
            out["seen"] = perceptual_metrics.features(parts["inception"], images)
        size = self._config.data.image_size
        if images.shape[1:3] != (size, size):
            images = jnp.clip(resize.bicubic(images, size, size, antialias=True), 0.0, 1.0)
        return {**out, **self._opinion(parts, images, self._autoencoder.encode(parts["encoder"], images))}

    def _opinion(self, parts, images, latents):
        features = {"features": latents.mean((1, 2))}
        if "judge" not in parts:
            return features
        return {**features, "judged": self._judge.apply({"params": parts["judge"]}, images).argmax(-1)}


class _Kept:
    """Of what is made of batches, the arrays that are kept of every image."""

    def __init__(self, *names):
        self._batches = {name: [] for name in names}

    def add(self, out):
        for name, batches in self._batches.items():
            if name in out:
                batches.append(out[name])

    def arrays(self):
        """{name: [N, ...]} of those that there were."""
        return {name: np.concatenate(batches) for name, batches in self._batches.items() if batches}


@contextlib.contextmanager
def _naming(name):
    """Whatever the user has to mend inside belongs to `name`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _add_pairs(pairs, out):
    """{class: (image, reconstruction)}, the first that come."""
    for i, label in enumerate(out["label"].tolist()):
        if label not in pairs and len(pairs) < SHOWN:
            pairs[label] = (out["image"][i].copy(), out["decoded"][i].copy())


def _picture(pairs):
    rows = zip(*(pairs[label] for label in sorted(pairs)), strict=True)
    picture = image_grid.grid(np.concatenate([np.stack(row) for row in rows]), len(pairs))
    return image_grid.with_captions(picture, ("held-out", "decoded"), scale=3)
