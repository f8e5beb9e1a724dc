"""Mesh and placement: which device holds which part of an array."""

import math
import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rae_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))  # every batch is split over these axes

# Ordered (regex over the leaf's path, rule): the first match decides, and every leaf must match one.
# 'fsdp' splits the largest axis that divides evenly; 'replicate' keeps a copy on every device.
RULES = (
    (r"(^|/)(step|count|ns_coeffs)$", "replicate"),
    (r"(^|/)(scale|bias|scale1|scale2|cls_token|registers|pos_embed|frequencies)$", "replicate"),
    (r"(^|/)(u|v)$", "replicate"),
    (r"(^|/)(kernel|table)$", "fsdp"),
    (r"(^|/)(mean|squares|var)(_low)?$", "replicate"),
)


def make_mesh(mesh, devices=None):
    """Mesh with axes data, fsdp, tensor; -1 takes the devices that the others leave.

    Raises UserError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [mesh[axis] for axis in AXES]
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = len(devices) // rest if rest else 0
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        asked = ", ".join(f"config.mesh.{axis}={mesh[axis]}" for axis in AXES)
        raise UserError(f"{asked} do not multiply to the {len(devices)} devices here: change one, or set it to -1")
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def batch_sharding(mesh):
    """Sharding of a global batch over its first axis."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh):
    """The same array on every device."""
    return NamedSharding(mesh, P())


def check_batch(batch_size, mesh, key):
    """Raise UserError where `batch_size`, the config's `key`, cannot be split over the mesh."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % ways:
        raise UserError(f"{key}={batch_size} cannot be split over {ways} devices: make it a multiple of {ways}")


def round_up(number, mesh):
    """The smallest batch of at least `number` that can be split over the mesh."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-number // ways) * ways


def even_batch(number, largest, mesh):
    """The size of equal batches for `number` examples, as few as `largest` allows, and each split over the mesh."""
    return round_up(-(-number // -(-number // largest)), mesh)


def shardings(shapes, mesh):
    """Tree of NamedSharding for a tree of shapes, by RULES. Raises ValueError for a leaf without a rule."""

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, rule in RULES:
            if re.search(pattern, name):
                spec = _fsdp(leaf.shape, mesh.shape["fsdp"]) if rule == "fsdp" else P()
                return NamedSharding(mesh, spec)
        raise ValueError(f"no sharding rule matches {name} {leaf.shape}: add one to sharding.RULES")

    return jax.tree_util.tree_map_with_path(place, shapes)


def _fsdp(shape, ways):
    divisible = [axis for axis, size in enumerate(shape) if size % ways == 0]
    if ways == 1 or not divisible:
        return P()
    largest = max(divisible, key=lambda axis: shape[axis])
    return P(*(None,) * largest, "fsdp")


def put_global(batch, mesh):
    """A whole batch (numpy), the same on every process -> global arrays split over the mesh."""
    placed = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, placed, lambda part: x[part]), batch)


def local_rows(batch_size, mesh):
    """The rows of a global batch that this process's devices hold, in order: what it has to read, and no more."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (part,) in parts for row in range(*part.indices(batch_size))})


def put_batch(batch, mesh):
    """This process's part of a batch (numpy), its `local_rows` -> global arrays split over the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
