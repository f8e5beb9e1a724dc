"""LPIPS of pairs of images, and what Inception's features say of sets of images."""

import jax
import numpy as np

from rae_jax.inference import metrics
from rae_jax.models.inception import POOL, SPATIAL, Inception
from rae_jax.models.lpips import Lpips
from rae_jax.runtime import logs, sharding

AT_A_TIME = 32  # images that Inception sees on a device: on a CPU each one takes some 90 MB
MOMENTS_OF = {"pool": POOL, "spatial": SPATIAL}  # features of Inception whose moments count, and their sizes


def compare(parts, images, others):
    """{'psnr', 'ssim', and 'lpips' if it is among the parts: [B]} of images in [0, 1], pair by pair."""
    scores = {"psnr": metrics.psnr(images, others), "ssim": metrics.ssim(images, others)}
    if "lpips" in parts:
        # Metrics are not for saving time: float32 in earnest, on every kind of device.
        with jax.default_matmul_precision("highest"):
            scores["lpips"] = Lpips().apply({"params": parts["lpips"]}, images, others)
    return scores


def features(params, images):
    """What `Inception` sees in 8-bit images, given as floats in [0, 1]; float32 in earnest."""
    with jax.default_matmul_precision("highest"):
        return sharding.in_parts(lambda x: Inception().apply({"params": params}, x), images, AT_A_TIME)


class Seen:
    """What Inception sees in a set of images, from batches of its `features`, or of some of them by name.

    `moments` are those of 'pool' and 'spatial'. Of every image only what is in `keep` is kept.
    """

    def __init__(self, keep=()):
        self.moments = {}
        self._kept = {name: [] for name in keep}

    def add(self, features):
        """Takes in a batch {name: [B, ...]}."""
        for name, values in features.items():
            if name in MOMENTS_OF:
                self.moments[name] = metrics.merge(self.moments.get(name, metrics.Moments()), metrics.moments(values))
            if name in self._kept:
                self._kept[name].append(values)

    def all(self, name):
        """[N, ...] of all images; None where there was none, or it was not kept."""
        kept = self._kept.get(name)
        return np.concatenate(kept) if kept else None


def compare_sets(found, reference):
    """{'fid', 'sfid', 'inception_score', 'precision', 'recall'} of two sets as `Seen`, as ADM's evaluator has them.

    The score is of the first alone. What cannot be computed for want of images is left out.
    """
    names = {"fid": "pool", "sfid": "spatial"}
    there = {name: kind for name, kind in names.items() if kind in reference.moments}
    results = {}
    for name, kind in there.items():
        results.update(frechet(name, found.moments[kind], reference.moments[kind]))
    results["inception_score"] = metrics.inception_score(found.all("logits"))
    pools = found.all("pool"), reference.all("pool")
    if any(pool is None or len(pool) <= metrics.NEIGHBOURS for pool in pools):
        logs.say(f"no precision and recall: they take more than {metrics.NEIGHBOURS} images, of the reference too")
        return results
    return {**results, **_precision_recall(*pools)}


def _precision_recall(found, reference):
    done, total = 0, 2 * (len(found) + len(reference))

    def tick(rows):
        nonlocal done
        done += rows
        progress.update(done)

    with logs.Progress("precision and recall", total=total, unit="row") as progress:
        precision, recall = metrics.precision_recall(found, reference, tick=tick)
    return {"precision": precision, "recall": recall}


def frechet(name, a, b):
    """{name: Fréchet distance} of two `metrics.Moments` or `Gaussian`s; {} of fewer than two images.

    Says so where they are too few for the number to be compared with others'.
    """
    count = min(m.count for m in (a, b) if isinstance(m, metrics.Moments))
    if count < 2:
        return {}
    size = len(a.mean)
    if count <= size:
        logs.say(
            f"{name}: {count} images leave the covariance of {size} features without full rank: "
            f"compare it with other numbers on the same images alone"
        )
    return {name: metrics.frechet_distance(a, b)}
