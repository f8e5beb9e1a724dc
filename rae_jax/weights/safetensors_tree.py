"""Write and read trees of parameters in safetensors files, with strict checks."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save

from rae_jax.errors import UserError
from rae_jax.weights import checks

_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


def write(path, tree):
    """Write a tree of arrays; keys are the paths joined by '/'."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save({key: np.ascontiguousarray(value) for key, value in flat.items()}))


def read(path, shapes):
    """Read a tree of exactly these shapes.

    Raises UserError that names the file and the key, for a missing file or key, an unknown key, another shape, or
    values that are not finite.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: name a folder that holds this file")
    try:
        found = dict(deserialize(path.read_bytes()))
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): fetch it again") from error
    wanted = traverse_util.flatten_dict(shapes, sep="/")
    shapes_of = {key: leaf.shape for key, leaf in wanted.items()}
    checks.same_tensors(path, shapes_of, {key: tuple(tensor["shape"]) for key, tensor in found.items()})
    arrays = {key: _array(path, key, found[key]).astype(leaf.dtype) for key, leaf in wanted.items()}
    for key, array in arrays.items():
        checks.finite(path, key, array)
    return traverse_util.unflatten_dict(arrays, sep="/")


def _array(path, key, tensor):
    if tensor["dtype"] not in _TYPES:
        raise UserError(f"{path}: {key!r} has the type {tensor['dtype']}: write it as F32, F16 or BF16")
    return np.frombuffer(tensor["data"], _TYPES[tensor["dtype"]]).reshape(tensor["shape"])


def is_tree(path):
    """Return whether a file is a safetensors file with a tree that `write` wrote: its keys are paths."""
    try:
        with safe_open(path, "numpy") as file:
            return any("/" in key for key in file.keys())  # noqa: SIM118  not a dict
    except (OSError, SafetensorError):
        return False


def digest(tree):
    """Return a hexadecimal digest of float32 arrays by name and bit, which does not depend on their sharding."""

    @jax.jit
    def sums(tree):
        """Sum the bits of each array, times a different odd number for each value, modulo 2^32: exact in any order."""

        def add_up(leaf):
            bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32).reshape(-1)
            return (bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1)).sum(dtype=jnp.uint32)

        return jax.tree.map(add_up, tree)

    flat = traverse_util.flatten_dict(jax.device_get(sums(tree)), sep="/")
    return hashlib.sha256(json.dumps({key: int(flat[key]) for key in sorted(flat)}).encode()).hexdigest()[:16]
