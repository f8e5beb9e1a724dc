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

# The config's keys of each part's files.
_KEYS = {"lpips": ("lpips.vgg", "lpips.linear"), "inception": ("evaluate.inception",)}
PARTS = tuple(_KEYS)


def named(config):
    """Those of PARTS that the config names weights of."""
    return tuple(part for part in PARTS if all(_source(config, key) for key in _KEYS[part]))


def load(config, part, mesh):
    """The part's parameters on the devices; None where the config names no weights.

    lpips: as `Lpips` takes them, from config.lpips.vgg and config.lpips.linear; inception: as `Inception` does, from
    config.evaluate.inception. Raises UserError for weights that are not there or not right, and names the key.
    """
    if part not in named(config):
        return None
    key, image = jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    match part:
        case "lpips":
            shapes = jax.eval_shape(Lpips().init, key, image, image)["params"]
            tables = {"vgg": perceptual.VGG16, "linear": perceptual.LPIPS}
            return {name: _read(config, f"lpips.{name}", tables[name], shapes[name], mesh) for name in tables}
        case "inception":
            shapes = jax.eval_shape(Inception().init, key, image)["params"]
            table = perceptual.inception(traverse_util.flatten_dict(shapes, sep="/"))
            return _read(config, "evaluate.inception", table, shapes, mesh)
        case other:
            raise ValueError(f"unknown network {other!r}")


def find(config):
    """Raise UserError where weights that the config names cannot be had; what the hub has is fetched to its cache."""
    for part in named(config):
        for key in _KEYS[part]:
            _open(config, key)


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
        return Inception().apply({"params": params}, images)


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


def _source(config, key):
    section, name = key.split(".")
    return config[section][name]


def _open(config, key):
    try:
        return hub.open_checkpoint(_source(config, key))
    except UserError as error:
        off = " ".join(f"--config.{k}=''" for keys in _KEYS.values() if key in keys for k in keys)
        raise UserError(f"config.{key}: {error}; or do without: {off}") from error


def _read(config, key, table, shapes, mesh):
    source = f"config.{key}={_source(config, key)}"
    return engine.load(source, _open(config, key), (table,), shapes, sharding.shardings(shapes, mesh))
