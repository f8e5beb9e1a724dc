"""The published networks that judge images, LPIPS' and Inception: their weights as a config names them, and what they
say of pairs of images and of sets of them."""

import jax
import jax.numpy as jnp
from flax import traverse_util

from rae_jax import logs, metrics, sharding
from rae_jax.errors import UserError
from rae_jax.models.inception import Inception
from rae_jax.models.lpips import Lpips
from rae_jax.weights import engine, hub, perceptual

PARTS = ("lpips", "inception")


def named(config):
    """Those of PARTS that the config names weights of."""
    return tuple(part for part in PARTS if all(_sources(config, part).values()))


def load(config, part, mesh):
    """The part's parameters on the devices; None where the config names no weights.

    lpips: as `Lpips` takes them, from config.lpips.vgg and config.lpips.linear; inception: as `Inception` does, from
    config.evaluate.inception. Raises UserError for weights that are not there or not right, and names the key.
    """
    if part not in named(config):
        return None
    image = jnp.zeros((1, 32, 32, 3))
    images = (image, image) if part == "lpips" else (image,)
    shapes = jax.eval_shape(_module(part).init, jax.random.key(0), *images)["params"]
    placed = sharding.shardings(shapes, mesh)
    if part == "inception":
        return _read(config, part, "evaluate.inception", shapes, placed)
    return {name: _read(config, part, f"lpips.{name}", shapes[name], placed[name]) for name in shapes}


def find(config):
    """Raise UserError where weights that the config names cannot be had; what the hub has is fetched to its cache."""
    for part in named(config):
        for key, source in _sources(config, part).items():
            _open(part, key, source)


def compare(parts, images, others):
    """{'psnr', 'ssim', 'lpips' if it is among the parts: [B]} of images in [0, 1] [B, H, W, 3], pair by pair."""
    scores = {"psnr": metrics.psnr(images, others), "ssim": metrics.ssim(images, others)}
    if parts.get("lpips"):
        # Metrics are not for saving time: float32 in earnest, on every kind of device.
        with jax.default_matmul_precision("highest"):
            scores["lpips"] = Lpips().apply({"params": parts["lpips"]}, images, others)
    return scores


def features(parts, images):
    """Inception's features of 8-bit images as floats in [0, 1], see `Inception`; {} where it is not among the parts."""
    if not parts.get("inception"):
        return {}
    with jax.default_matmul_precision("highest"):
        return Inception().apply({"params": parts["inception"]}, images)


class PairMoments:
    """Moments of Inception's features of images and of their reconstructions, from batches of 'seen' and
    'seen_decoded'."""

    def __init__(self):
        self._given, self._decoded = metrics.Moments(), metrics.Moments()

    def add(self, batch):
        """Takes the two out of a batch {name: array [B, ...]}, where they are there."""
        if "seen" in batch:
            self._given = metrics.merge(self._given, metrics.moments(batch.pop("seen")))
            self._decoded = metrics.merge(self._decoded, metrics.moments(batch.pop("seen_decoded")))

    def rfid(self):
        """{'rfid': Fréchet distance between the two}; {} of fewer than two images.

        Says so where they are too few for a number to be compared with others'.
        """
        count = self._given.count
        if count < 2:
            return {}
        size = len(self._given.mean)
        if count <= size:
            logs.say(
                f"rfid: {count} images leave the covariance of {size} features without full rank: "
                f"compare it with other numbers on the same images alone"
            )
        return {"rfid": metrics.frechet_distance(self._given, self._decoded)}


def _module(part):
    match part:
        case "lpips":
            return Lpips()
        case "inception":
            return Inception()
        case other:
            raise ValueError(f"no network {other!r}")


def _sources(config, part):
    """{key: weights} of a part's files."""
    match part:
        case "lpips":
            return {f"lpips.{name}": config.lpips[name] for name in ("vgg", "linear")}
        case "inception":
            return {"evaluate.inception": config.evaluate.inception}
        case other:
            raise ValueError(f"no network {other!r}")


def _read(config, part, key, shapes, placed):
    source = _sources(config, part)[key]
    match key:
        case "lpips.vgg":
            table = perceptual.VGG16
        case "lpips.linear":
            table = perceptual.LPIPS
        case "evaluate.inception":
            table = perceptual.inception(traverse_util.flatten_dict(shapes, sep="/"))
        case other:
            raise ValueError(f"no weights {other!r}")
    return engine.load(source, _open(part, key, source), (table,), shapes, placed)


def _open(part, key, source):
    try:
        return hub.open_checkpoint(source)
    except UserError as error:
        off = "".join(f" --config.{key}=''" for key in _OFF[part])
        raise UserError(f"config.{key}: {error}; or do without:{off}") from error


_OFF = {"lpips": ("lpips.vgg", "lpips.linear"), "inception": ("evaluate.inception",)}
