"""Mesh and placement: which device holds which part of an array."""

import functools
import math
import os
import re
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rae_jax.errors import UserError, one_line

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))  # the axes that split every batch and every activation
# The limit if config.mesh leaves both data and fsdp open. XL's whole state is then 0.8 GiB per device, and every device
# has 72 of 1152 channels, whole tiles of a TPU's memory. With 18 channels, on 64 devices, every product copies the
# gathered kernel once more.
MOST_FSDP = 16
SMALL = 2**18  # elements; a leaf that no axis divides may be replicated up to this size


class Rule(NamedTuple):
    """The split of a kernel [..., D, F]; parameters of other shapes are not split."""

    fsdp: int | None = -2  # the axis to split if fsdp divides it, otherwise the other of the last two; None: no axis
    tensor: str | None = None  # of two products in a row, the first is split by 'column' (F), the second by 'row' (D)
    parts: int = 1  # parts that are concatenated in F; each part is split


# Ordered (regex over the leaf's path, rule): the first match decides, and every leaf must match a rule. The paths of a
# parameter's moments and averages end with the parameter's name.
RULES = (
    (r"(^|/)(step|count|ns_coeffs)$", Rule(fsdp=None)),
    (r"(^|/)(scale|bias|scale1|scale2|cls_token|registers|pos_embed|frequencies|tokens|time_tokens)$", Rule(fsdp=None)),
    (r"(^|/)(u|v)$", Rule(fsdp=None)),
    (r"(^|/)qkv/kernel$", Rule(tensor="column", parts=3)),
    (r"(^|/)w12/kernel$", Rule(tensor="column", parts=2)),
    (r"(^|/)(blocks|base|trunk|head)/modulation/linear/kernel$", Rule(tensor="column", parts=6)),
    (r"(^|/)mlp/fc1/kernel$", Rule(tensor="column")),
    (r"(^|/)(attention/proj|mlp/w3|mlp/fc2)/kernel$", Rule(tensor="row")),
    (r"(^|/)kernel$", Rule()),
    (r"(^|/)table$", Rule(fsdp=-1)),
    (r"(^|/)(mean|squares|var)(_low)?$", Rule(fsdp=None)),
)


def all_devices():
    """Return jax.devices(). Raises UserError if JAX finds no device of the platforms that it is told to use."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error, longest=200) or "there is no such device"
        raise UserError(
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r} cannot work here ({reason}): unset it, or install "
            f"JAX for this hardware"
        ) from error


def make_mesh(mesh, devices=None):
    """Return a mesh with axes data, fsdp, tensor; a size of -1 takes the devices that the other axes leave.

    If both data and fsdp are -1, fsdp takes at most MOST_FSDP and data takes the rest. Slices are outermost: only the
    data axis crosses slices. Raises UserError if the product of the sizes is not the number of devices, or if data is
    not a multiple of the number of slices.
    """
    devices = all_devices() if devices is None else devices
    # On other platforms JAX may call every host a slice; jax.devices() has their order already.
    slices = len({getattr(d, "slice_index", None) for d in devices}) if devices[0].platform == "tpu" else 1
    sizes = _sizes(mesh, len(devices), slices)
    asked = ", ".join(f"config.mesh.{axis}={mesh[axis]}" for axis in AXES)
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        raise UserError(f"{asked} do not multiply to the {len(devices)} devices here: change one, or set it to -1")
    if sizes[0] % slices:
        raise UserError(
            f"{asked} cannot work: only data crosses slices, so set config.mesh.data to a multiple of {slices}, the "
            f"number of slices"
        )
    return Mesh(_arranged(sizes, slices, devices), AXES)


def _sizes(mesh, num_devices, slices):
    sizes = [mesh[axis] for axis in AXES]
    for axis in (1, 0, 2):  # fsdp before data
        if sizes[axis] == -1:
            rest = num_devices // (math.prod(abs(size) for size in sizes) or num_devices)
            sizes[axis] = math.gcd(rest // slices, MOST_FSDP) if axis == 1 and sizes[0] == -1 else rest
    return sizes


def _arranged(sizes, slices, devices):
    """Return the devices as an array; on TPU, neighbours on an axis are neighbours in the torus if possible."""
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
    except (AssertionError, NotImplementedError, ValueError):  # JAX knows no such assignment
        return np.asarray(devices).reshape(sizes)


def jit(function, mesh, **options):
    """jax.jit of a function whose models compute on a mesh: see models.mesh_matmul."""

    def on_mesh(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return jax.jit(functools.wraps(function)(on_mesh), **options)


def current_mesh():
    """Return the abstract mesh inside sharding.jit; None outside, also if callers have set a mesh of their own."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.axis_names == AXES and mesh.are_all_axes_auto else None


def in_parts(function, x, most):
    """Return function(x) of x [B, ...] inside `jit`, computed in parts of at most `most` rows per device.

    This saves memory. `function` must treat every row alone. If no suitable divisor of the rows exists, the parts are
    smaller.
    """
    mesh = current_mesh()
    rows = x.shape[0] // (1 if mesh is None else ways(mesh))
    count = next(n for n in range(-(-rows // most), rows + 1) if rows % n == 0)
    if count == 1:
        return function(x)
    # Every device keeps its own rows: neighbouring rows go to different parts.
    parts = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
    found = jax.lax.map(function, parts)
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(x.shape[0], *a.shape[2:]), found)


def batch_sharding(mesh):
    """Return the sharding of a global batch over its first axis."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh):
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def ways(mesh):
    """Return the number of parts into which the mesh splits a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(batch_size, mesh, key):
    """Raise UserError if `batch_size`, the value of the config's `key`, cannot be split over the mesh."""
    if batch_size % ways(mesh):
        raise UserError(
            f"{key}={batch_size} cannot be split over {ways(mesh)} devices: set it to a multiple of {ways(mesh)}"
        )


def round_up(number, mesh):
    """Return the smallest batch size of at least `number` that can be split over the mesh."""
    return -(-number // ways(mesh)) * ways(mesh)


def even_batch(number, largest, mesh):
    """Return the batch size that splits `number` examples into the fewest equal batches, of about `largest` at most."""
    return round_up(-(-number // -(-number // largest)), mesh)


def shardings(shapes, mesh):
    """Return a tree of NamedSharding for a tree of shapes, by RULES.

    Raises ValueError for a leaf without a rule, UserError for a large leaf that the fsdp axis does not divide.
    """

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec(name, leaf.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(place, shapes)


def abstract(shapes, mesh):
    """Return the tree of shapes with the sharding of each leaf by RULES."""

    def place(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, shardings(shapes, mesh))


def place(name, shape, sizes):
    """Return (axis split by fsdp or None, 'column', 'row' or None) of a kernel [..., D, F] by RULES.

    `sizes` are the sizes of the mesh's axes. Raises ValueError and UserError as `shardings` does.
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
            f"config.mesh.fsdp={ways} divides no axis of {name} {tuple(shape)}: set it to "
            f"{math.gcd(*shape[-2:], ways)}, and config.mesh.data to the remaining factor"
        )
    return (fitting[0] if fitting and ways > 1 else None), tensor


def spec(name, shape, sizes):
    """Return the PartitionSpec of a stored leaf.

    A kernel whose columns are several parts is stored split by rows; in use, the columns of each part are split.
    """
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
    """Return global arrays, split over the mesh, of a whole batch (numpy) that every process holds."""
    placed = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, placed, lambda part: x[part]), batch)


def local_rows(batch_size, mesh):
    """Return the rows of a global batch that this process's devices hold, in order: the rows that it must read."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (part,) in parts for row in range(*part.indices(batch_size))})


def put_batch(batch, mesh):
    """Return global arrays, split over the mesh, of this process's part of a batch (numpy): its `local_rows`."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
