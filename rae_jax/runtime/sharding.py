"""Mesh and placement: which device holds which part of an array."""

import functools
import math
import re
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rae_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))  # every batch, and every activation, is split over these axes
# Where config.mesh leaves it open. XL's whole state is 0.8 GiB a device by then, and of 1152 channels every device has
# 72, whole tiles of a TPU's memory: of 18, among 64 devices, what is gathered is copied once more for each product.
MOST_FSDP = 16
SMALL = 2**18  # elements; what no axis divides may be replicated up to this size


class Rule(NamedTuple):
    """How a kernel [..., D, F] is split; parameters of other shapes are not."""

    fsdp: int | None = -2  # which axis, where it divides, else the other one of the last two; None: no axis
    tensor: str | None = None  # of products in a row, the first is split by 'column' (F), the second by 'row' (D)
    parts: int = 1  # that lie side by side in F; each is split


# Ordered (regex over the leaf's path, rule): the first match decides, and every leaf must match one. The moments and
# averages of a parameter have its name.
RULES = (
    (r"(^|/)(step|count|ns_coeffs)$", Rule(fsdp=None)),
    (r"(^|/)(scale|bias|scale1|scale2|cls_token|registers|pos_embed|frequencies)$", Rule(fsdp=None)),
    (r"(^|/)(u|v)$", Rule(fsdp=None)),
    (r"(^|/)qkv/kernel$", Rule(tensor="column", parts=3)),
    (r"(^|/)w12/kernel$", Rule(tensor="column", parts=2)),
    (r"(^|/)(blocks|trunk|head)/modulation/linear/kernel$", Rule(tensor="column", parts=6)),
    (r"(^|/)mlp/fc1/kernel$", Rule(tensor="column")),
    (r"(^|/)(attention/proj|mlp/w3|mlp/fc2)/kernel$", Rule(tensor="row")),
    (r"(^|/)kernel$", Rule()),
    (r"(^|/)table$", Rule(fsdp=-1)),
    (r"(^|/)(mean|squares|var)(_low)?$", Rule(fsdp=None)),
)


def make_mesh(mesh, devices=None):
    """Mesh with axes data, fsdp, tensor; -1 takes the devices that the others leave.

    Of two that are -1, fsdp takes at most MOST_FSDP and data the rest. Slices are outermost: neighbours on the data
    axis may lie in two of them, those on the others never do. Raises UserError where the sizes do not multiply to the
    number of devices, or data does not to that of slices.
    """
    devices = jax.devices() if devices is None else devices
    # Elsewhere JAX may call every host a slice, but their order is that of jax.devices() already.
    slices = len({getattr(d, "slice_index", None) for d in devices}) if devices[0].platform == "tpu" else 1
    sizes = _sizes(mesh, len(devices), slices)
    asked = ", ".join(f"config.mesh.{axis}={mesh[axis]}" for axis in AXES)
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        raise UserError(f"{asked} do not multiply to the {len(devices)} devices here: change one, or set it to -1")
    if sizes[0] % slices:
        raise UserError(f"{asked}: only data crosses slices, and {sizes[0]} is no multiple of the {slices} slices here")
    return Mesh(_arranged(sizes, slices, devices), AXES)


def _sizes(mesh, num_devices, slices):
    sizes = [mesh[axis] for axis in AXES]
    for axis in (1, 0, 2):  # fsdp before data
        if sizes[axis] == -1:
            rest = num_devices // (math.prod(abs(size) for size in sizes) or num_devices)
            sizes[axis] = math.gcd(rest // slices, MOST_FSDP) if axis == 1 and sizes[0] == -1 else rest
    return sizes


def _arranged(sizes, slices, devices):
    """The devices as an array: on TPU so that neighbours on an axis are neighbours in the torus, where that can be."""
    if slices > 1:
        devices = sorted(devices, key=lambda device: device.slice_index)
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)
    options = {"devices": devices, "allow_split_physical_axes": True}
    try:
        if slices > 1:
            inside = (sizes[0] // slices, *sizes[1:])
            return mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), **options)
        return mesh_utils.create_device_mesh(sizes, **options)
    except (AssertionError, NotImplementedError, ValueError):  # no such assignment is known
        return np.asarray(devices).reshape(sizes)


def jit(function, mesh, **options):
    """jax.jit of a function whose models compute on a mesh: see models.mesh_matmul."""

    def on_mesh(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return jax.jit(functools.wraps(function)(on_mesh), **options)


def in_parts(function, x, most):
    """function(x) of x [B, ...] inside `jit`, row by row the same, by parts of at most `most` rows a device.

    For what needs much memory a row. A number of rows without such a divisor makes smaller parts.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = x.shape[0] // (1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"])
    count = next(n for n in range(-(-rows // most), rows + 1) if rows % n == 0)
    if count == 1:
        return function(x)
    # Every device keeps its own rows: neighbours go to different parts.
    parts = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
    found = jax.lax.map(function, parts)
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(x.shape[0], *a.shape[2:]), found)


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
    """Tree of NamedSharding for a tree of shapes, by RULES.

    Raises ValueError for a leaf without a rule, UserError for a large one that the fsdp axis does not divide.
    """

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec(name, leaf.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(place, shapes)


def abstract(shapes, mesh):
    """A tree of shapes, each with its sharding by RULES."""

    def place(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, shardings(shapes, mesh))


def place(name, shape, sizes):
    """(axis split by fsdp or None, 'column', 'row' or None) of a kernel [..., D, F] by RULES; `sizes` are the mesh's.

    Raises ValueError and UserError as `shardings` does.
    """
    rule = _rule(name, shape)
    if rule.fsdp is None:
        return None, None
    left = {-2: shape[-2], -1: shape[-1]}
    tensor = rule.tensor if sizes["tensor"] > 1 else None
    if tensor:
        axis, pieces = (-1, rule.parts * sizes["tensor"]) if tensor == "column" else (-2, sizes["tensor"])
        tensor = tensor if left[axis] % pieces == 0 else None
        left[axis] //= pieces if tensor else 1
    ways = sizes["fsdp"]
    fitting = [axis for axis in (rule.fsdp, -3 - rule.fsdp) if left[axis] % ways == 0]
    if not fitting and math.prod(shape) > SMALL:
        raise UserError(
            f"config.mesh.fsdp={ways} divides no axis of {name} {tuple(shape)}: take {math.gcd(*shape[-2:], ways)}, "
            f"and config.mesh.data for the rest"
        )
    return (fitting[0] if fitting and ways > 1 else None), tensor


def spec(name, shape, sizes):
    """How a leaf is kept. Columns of several parts are kept by rows: each part has its own columns split in use."""
    fsdp, tensor = place(name, shape, sizes)
    by = {-2: [], -1: []}
    if fsdp is not None:
        by[fsdp].append("fsdp")
    if tensor == "row":
        by[-2].insert(0, "tensor")
    elif tensor and _rule(name, shape).parts == 1:
        by[-1].insert(0, "tensor")
    elif tensor and shape[-2] % (sizes["tensor"] * (sizes["fsdp"] if by[-2] else 1)) == 0:
        by[-2].append("tensor")
    if not any(by.values()):
        return P()
    return P(*(None,) * (len(shape) - 2), *(tuple(by[axis]) or None for axis in (-2, -1)))


def _rule(name, shape):
    rule = next((rule for pattern, rule in RULES if re.search(pattern, name)), None)
    if rule is None:
        raise ValueError(f"no sharding rule matches {name} {tuple(shape)}: add one to sharding.RULES")
    return rule


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
