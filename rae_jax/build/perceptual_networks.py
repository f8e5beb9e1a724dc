"""The weights that a config names of the published networks that compare images: LPIPS and Inception."""

import jax
import jax.numpy as jnp
from flax import traverse_util

from rae_jax.errors import UserError
from rae_jax.models.inception import Inception
from rae_jax.models.lpips import Lpips
from rae_jax.runtime import sharding
from rae_jax.weights import engine, hub, perceptual_tables

# The config's keys that name each part's files.
_KEYS = {"lpips": ("lpips.vgg", "lpips.linear"), "inception": ("evaluate.inception",)}
PARTS = tuple(_KEYS)


def named(config):
    """Return the elements of PARTS whose weights the config names."""
    return tuple(part for part in PARTS if all(_source(config, key) for key in _KEYS[part]))


def weights_in_words(config, part):
    """Return the keys and the values that name a part's weights, for messages."""
    return ", ".join(f"config.{key}={_source(config, key)!r}" for key in _KEYS[part])


def load(config, part, mesh):
    """Return the part's parameters on the devices; None if the config names no weights.

    lpips: parameters of `Lpips`, from config.lpips.vgg and config.lpips.linear. inception: parameters of `Inception`,
    from config.evaluate.inception. Raises UserError, which names the key, for weights that do not exist or do not fit.
    """
    if part not in named(config):
        return None
    shapes = part_shapes(part)
    match part:
        case "lpips":
            tables = {"vgg": perceptual_tables.VGG16, "linear": perceptual_tables.LPIPS}
            return {name: _read(config, f"lpips.{name}", tables[name], shapes[name], mesh) for name in tables}
        case "inception":
            table = perceptual_tables.inception(traverse_util.flatten_dict(shapes, sep="/"))
            return _read(config, "evaluate.inception", table, shapes, mesh)
        case other:
            raise ValueError(f"unknown network {other!r}")


def part_shapes(part):
    """Return the tree of shapes of a part's parameters."""
    key, image = jax.random.key(0), jnp.zeros((1, 32, 32, 3), jnp.float32)
    match part:
        case "lpips":
            return jax.eval_shape(Lpips().init, key, image, image)["params"]
        case "inception":
            return jax.eval_shape(Inception().init, key, image)["params"]
        case other:
            raise ValueError(f"unknown network {other!r}")


def check_available(config):
    """Raise UserError for weights that the config names and that cannot be opened; the hub's cache keeps downloads."""
    for part in named(config):
        for key in _KEYS[part]:
            _open(config, key)


def _source(config, key):
    section, name = key.split(".")
    return config[section][name]


def _open(config, key):
    try:
        return hub.open_checkpoint(_source(config, key))
    except UserError as error:
        off = " ".join(f"--config.{k}=''" for keys in _KEYS.values() if key in keys for k in keys)
        raise UserError(f"config.{key}: {error}; or leave these weights out: {off}") from error


def _read(config, key, table, shapes, mesh):
    source = f"config.{key}={_source(config, key)}"
    return engine.load(source, _open(config, key), (table,), shapes, sharding.shardings(shapes, mesh))
