"""PSNR, SSIM and LPIPS of pairs of images, and metrics of sets of images that use Inception's features."""

import jax

from rae_jax.inference import metrics
from rae_jax.models.inception import POOL, SPATIAL, Inception
from rae_jax.models.lpips import Lpips
from rae_jax.runtime import logs, sharding

AT_A_TIME = 32  # images per device in one pass of Inception: on a CPU each image takes about 90 MB
MOMENTS_OF = {"pool": POOL, "spatial": SPATIAL}  # {name: size} of Inception's features whose moments FID and sFID take


def compare(parts, images, others):
    """Return {'psnr': [B], 'ssim': [B]} of pairs of images in [0, 1], and 'lpips': [B] if LPIPS is among the parts."""
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
    """Return {'fid', 'sfid', 'inception_score', 'precision', 'recall'} of two Collectors, as in ADM's evaluator.

    `found` holds the moments of `MOMENTS_OF`, 'pool' and 'logits'; inception_score is of `found` alone. A metric that
    needs more images is left out.
    """
    names = {"fid": "pool", "sfid": "spatial"}
    results = {}
    for name, kind in names.items():
        if kind in reference.moments:
            results.update(frechet(name, found.moments[kind], reference.moments[kind]))
    results["inception_score"] = metrics.inception_score(found.array("logits"))
    pools = found.array("pool"), reference.array("pool")
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

    Log a message if the number of images is too small to compare the distance with published numbers.
    """
    count = min(m.count for m in (a, b) if isinstance(m, metrics.Moments))
    if count < 2:
        return {}
    size = len(a.mean)
    if count <= size:
        logs.say(
            f"{name}: the covariance of {size} features from {count} images does not have full rank: "
            f"compare this number only with numbers of the same images"
        )
    return {name: metrics.frechet_distance(a, b)}
