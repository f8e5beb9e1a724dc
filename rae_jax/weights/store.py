"""Parameter trees in safetensors files, strictly checked."""

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from safetensors import SafetensorError
from safetensors.numpy import load, save

from rae_jax.errors import UserError


def write(path, tree):
    """Write a tree of arrays; keys are the paths joined by '/'."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save({key: np.ascontiguousarray(value) for key, value in flat.items()}))


def read(path, shapes):
    """Read a tree of exactly these shapes.

    Raises UserError naming the file and the key: missing file or key, unknown key, other shape.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"no weights at {path}: name a folder that holds this file")
    try:
        found = load(path.read_bytes())
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): fetch it again") from error
    wanted = traverse_util.flatten_dict(shapes, sep="/")
    for key in sorted(wanted.keys() ^ found.keys()):
        kind = "lacks" if key in wanted else "has an unknown"
        raise UserError(f"{path} {kind} tensor {key!r}: it was made for another model than the config's")
    for key, leaf in wanted.items():
        if found[key].shape != leaf.shape:
            raise UserError(f"{path}: {key!r} has shape {found[key].shape}, the config's model needs {leaf.shape}")
    dtypes = {key: found[key].astype(leaf.dtype) for key, leaf in wanted.items()}
    return traverse_util.unflatten_dict(jax.tree.map(np.asarray, dtypes), sep="/")
