"""LPIPS of pairs of images, and metrics of sets of images by Inception's features."""

import jax

from rae_jax.inference import metrics
from rae_jax.models.inception import POOL, SPATIAL, Inception
from rae_jax.models.lpips import Lpips
from rae_jax.runtime import logs, sharding

AT_A_TIME = 32  # images per device in one pass of Inception: on a CPU each one takes some 90 MB
MOMENTS_OF = {"pool": POOL, "spatial": SPATIAL}  # Inception's features whose moments FID and sFID take, and their sizes


def compare(parts, images, others):
    """Return {'psnr', 'ssim', and 'lpips' if it is among the parts: [B]} of pairs of images in [0, 1]."""
    scores = {"psnr": metrics.psnr(images, others), "ssim": metrics.ssim(images, others)}
    if "lpips" in parts:
        # Metrics are exact rather than fast: full float32 on every kind of device.
        with jax.default_matmul_precision("highest"):
            scores["lpips"] = Lpips().apply({"params": parts["lpips"]}, images, others)
    return scores


def features(params, images):
    """Return Inception's outputs by name for 8-bit images, given as floats in [0, 1]; in full float32."""
    with jax.default_matmul_precision("highest"):
        return sharding.in_parts(lambda x: Inception().apply({"params": params}, x), images, AT_A_TIME)


def compare_sets(found, reference):
    """Return {'fid', 'sfid', 'inception_score', 'precision', 'recall'} of two Collectors, as ADM's evaluator defines them.

    `found` holds the moments of `MOMENTS_OF`, 'pool' and 'logits'; the score is of `found` alone. A metric for which there
    are too few images is left out.
    """
    names = {"fid": "pool", "sfid": "spatial"}
    results = {}
    for name, kind in names.items():
        if kind in reference.moments:
            results.update(frechet(name, found.moments[kind], reference.moments[kind]))
    ours, theirs = found.arrays(), reference.arrays()
    results["inception_score"] = metrics.inception_score(ours["logits"])
    pools = ours["pool"], theirs.get("pool")
    if any(pool is None or len(pool) <= metrics.NEIGHBOURS for pool in pools):
        logs.say(f"no precision and recall: they need more than {metrics.NEIGHBOURS} images in both sets")
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
    """Return {name: Fréchet distance} of two `metrics.Moments` or `Gaussian`s; {} for fewer than two images.

    Too few images for a number that can be compared with the numbers of others are reported.
    """
    count = min(m.count for m in (a, b) if isinstance(m, metrics.Moments))
    if count < 2:
        return {}
    size = len(a.mean)
    if count <= size:
        logs.say(
            f"{name}: the covariance of {size} features from {count} images has no full rank: compare this number only "
            f"with numbers of the same images"
        )
    return {name: metrics.frechet_distance(a, b)}
