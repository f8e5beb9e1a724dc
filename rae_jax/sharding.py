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
MOST_FSDP = 64  # where config.mesh leaves it open: every kernel of the full-size configs divides by it
SMALL = 2**18  # elements; what no axis divides may be replicated up to this size


class Rule(NamedTuple):
    """Where the last two axes of a kernel are split: -2 is its input, -1 its output."""

    fsdp: int | None = -2  # where it divides, else the other one; None: every device has a copy
    tensor: int | None = None
    parts: int = 1  # equal ones that lie side by side on the tensor axis; each must divide


# Ordered (regex over the leaf's path, rule): the first match decides, and every leaf must match one. The moments and
# averages of a parameter have its name. `tensor` as in Megatron: products in pairs, the first one's outputs split as the
# second one's inputs are.
RULES = (
    (r"(^|/)(step|count|ns_coeffs)$", Rule(fsdp=None)),
    (r"(^|/)(scale|bias|scale1|scale2|cls_token|registers|pos_embed|frequencies)$", Rule(fsdp=None)),
    (r"(^|/)(u|v)$", Rule(fsdp=None)),
    (r"(^|/)qkv/kernel$", Rule(tensor=-1, parts=3)),
    (r"(^|/)w12/kernel$", Rule(tensor=-1, parts=2)),
    (r"(^|/)(mlp/fc1|modulation/linear)/kernel$", Rule(tensor=-1)),
    (r"(^|/)(attention/proj|mlp/w3|mlp/fc2)/kernel$", Rule(tensor=-2)),
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
    slices = len({getattr(device, "slice_index", 0) for device in devices})
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
    """The devices as an array: on TPU so that neighbours on an axis are neighbours in the machine, where that can be."""
    options = {"devices": devices, "allow_split_physical_axes": True}
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)
    try:
        if slices > 1:
            inside = (sizes[0] // slices, *sizes[1:])
            return mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), **options)
        return mesh_utils.create_device_mesh(sizes, **options)
    except (NotImplementedError, ValueError):  # no such assignment is known
        return np.asarray(sorted(devices, key=lambda device: getattr(device, "slice_index", 0))).reshape(sizes)


def jit(function, mesh, **options):
    """jax.jit of a function whose models split their activations and gather their kernels as the mesh wants."""

    def on_mesh(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return jax.jit(functools.wraps(function)(on_mesh), **options)


def split_batch(x):
    """Activations [B, ...] inside `jit`, B split over the mesh; elsewhere, or where B does not divide, as they are.

    Without it the partitioner may gather the whole batch to meet split kernels.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, P(*BATCH, *(P.UNCONSTRAINED,) * (x.ndim - 1)))


def gathered(kernel, name):
    """A kernel inside `jit`, whole but for its tensor part; its gradient is summed straight into parts again.

    `name` is the end of its path. Cast it before: what travels has its dtype.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel
    return _gathered(
        kernel, _spec(name, kernel.shape, mesh.shape), _spec(name, kernel.shape, {**mesh.shape, "fsdp": 1})
    )


def gathers():
    """Whether kernels are gathered at all here."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["fsdp"] > 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(kernel, split, whole):
    kernel = jax.lax.with_sharding_constraint(kernel, split)
    return jax.lax.with_sharding_constraint(kernel, whole)


def _gathered_forward(kernel, split, whole):
    return _gathered(kernel, split, whole), None


def _gathered_backward(split, whole, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, split),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


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
        return NamedSharding(mesh, _spec(name, leaf.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(place, shapes)


def _spec(name, shape, sizes):
    rule = next((rule for pattern, rule in RULES if re.search(pattern, name)), None)
    if rule is None:
        raise ValueError(f"no sharding rule matches {name} {shape}: add one to sharding.RULES")
    if rule.fsdp is None:
        return P()
    axes, left = {-2: [], -1: []}, {-2: shape[-2], -1: shape[-1]}
    if rule.tensor and left[rule.tensor] % (rule.parts * sizes["tensor"]) == 0:
        axes[rule.tensor].append("tensor")
        left[rule.tensor] //= sizes["tensor"]
    ways = sizes["fsdp"]
    found = [axis for axis in (rule.fsdp, -3 - rule.fsdp) if left[axis] % ways == 0]
    if found:
        axes[found[0]].append("fsdp")
    elif math.prod(shape) > SMALL:
        raise UserError(
            f"config.mesh.fsdp={ways} divides no axis of {name} {tuple(shape)}: take {math.gcd(*shape[-2:], ways)}, "
            f"and config.mesh.data for the rest"
        )
    used = [tuple(axis for axis in axes[n] if sizes[axis] > 1) or None for n in (-2, -1)]
    return P(*(None,) * (len(shape) - 2), *used) if any(used) else P()


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
