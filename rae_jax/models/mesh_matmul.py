"""Products with kernels: on a mesh the batch stays split and each kernel travels once each way; and by platform.

Without instructions, XLA's partitioner may gather the activations of the whole batch to multiply a split kernel, sum
gradients on every device before it splits them, or compile products to rings of small products, which takes minutes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from rae_jax.models.derivatives import bilinear, linear_map
from rae_jax.runtime import collectives, sharding

ALIGNED = 8  # numbers; 16 bytes of bfloat16, to which NVIDIA GPUs align the rows of a matrix for their fast loads


def product(x, kernel, name, parts=1):
    """Multiply x [B, ..., D] by kernel [D, F] -> ([B, ..., F], pieces); `name` is the end of the kernel's path.

    Inside sharding.jit, if the mesh divides B: every device gathers the kernel, in the kernel's dtype, multiplies
    its part of the batch and drops the kernel. The kernel's gradient is summed straight into the parts that the devices
    hold. Where the tensor axis splits F, the result has that number of pieces; each has a piece of all `parts`.
    """
    mesh = sharding.current_mesh()
    if mesh is None or x.shape[0] % sharding.ways(mesh):
        return _product(x, kernel, None), 1
    fsdp, tensor = sharding.place(name, kernel.shape, mesh.shape)
    pieces = mesh.shape["tensor"] if tensor == "column" else 1
    columns = (parts, -1) if pieces > 1 and parts > 1 else (-1,)
    kernel = kernel.reshape(kernel.shape[0], *columns)
    return _product(x, kernel, _plan(fsdp, tensor, columns)), pieces


def split_parts(y, pieces, parts):
    """Return the `parts` of a product [B, ..., F] that has `pieces`."""
    if pieces == 1 or parts == 1:
        return tuple(jnp.split(y, parts, -1))
    y = y.reshape(*y.shape[:-1], pieces, parts, -1)
    return tuple(y[..., i, :].reshape(*y.shape[:-3], -1) for i in range(parts))


def gathered(kernel, name):
    """Return a kernel gathered over all axes but tensor, inside sharding.jit; its gradient is summed into parts.

    `name` is the end of the kernel's path. Cast the kernel first: it is sent in its dtype.
    """
    mesh = sharding.current_mesh()
    if mesh is None:
        return kernel
    split = sharding.spec(name, kernel.shape, mesh.shape)
    whole = sharding.spec(name, kernel.shape, {**mesh.shape, "fsdp": 1})
    constrain = jax.lax.with_sharding_constraint
    return linear_map(
        lambda _, kernel: constrain(constrain(kernel, split), whole),
        lambda _, gradient: constrain(gradient, split),
        (),
        kernel,
    )


class _Plan(NamedTuple):
    """The split of a kernel over the mesh, and of the input and the output of its product."""

    fsdp: int | None  # the axis that is gathered
    kernel: P
    columns: tuple  # the shape of one row of the kernel on a device: (parts, F) or (F,), with -1 for F
    ends: tuple  # (axis of the mesh that splits the last axis of x, or None; the same for the product)


def _plan(fsdp, tensor, columns):
    first = [axis for axis, split in (("tensor", tensor == "row"), ("fsdp", fsdp == -2)) if split]
    last = [axis for axis, split in (("tensor", tensor == "column"), ("fsdp", fsdp == -1)) if split]
    kernel = P(tuple(first) or None, *(None,) * (len(columns) - 1), tuple(last) or None)
    ends = tuple("tensor" if tensor == kind else None for kind in ("row", "column"))
    return _Plan({None: None, -2: 0, -1: len(columns)}[fsdp], kernel, columns, ends)


def _activations(ndim, end):
    """Return the spec of x or of the product. `end`: the mesh's axis that splits the last axis, or None."""
    return P(*sharding.BATCH, *(None,) * (ndim - 2), end)


# The product and its two transposes: each is linear in both arguments, and a transpose of the other two. Without a
# plan they compute on one device, or as XLA partitions them. No gathered kernel is a residual: it is gathered again.


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _product(x, kernel, plan):
    """x [B, ..., D], kernel [D, (parts,) F] -> [B, ..., F]."""
    return _times_kernel(x, kernel, plan, transposed=False)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _to_input(dy, kernel, plan):
    """dy [B, ..., F], kernel [D, (parts,) F] -> [B, ..., D]."""
    return _times_kernel(dy, kernel, plan, transposed=True)


def _times_kernel(x, kernel, plan, *, transposed):
    """Return x times the kernel, or times its transpose."""

    def times(x, matrix):
        return _times(x, matrix.T if transposed else matrix)

    if plan is None:
        return times(x, kernel)
    of_input, of_output = reversed(plan.ends) if transposed else plan.ends

    def on_device(x, kernel):
        whole = _gather(kernel, plan)
        y = times(x, whole.reshape(whole.shape[0], -1))
        return jax.lax.psum(y, of_input) if of_input else y

    specs, out = (_activations(x.ndim, of_input), plan.kernel), _activations(x.ndim, of_output)
    return jax.shard_map(on_device, in_specs=specs, out_specs=out, check_vma=False)(x, kernel)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _to_kernel(x, dy, plan):
    """x [B, ..., D], dy [B, ..., F] -> [D, (parts,) F], summed over all other axes."""
    if plan is None:
        return _outer(x, dy)

    def on_device(x, dy):
        dkernel = _outer(x, dy)
        dkernel = dkernel.reshape(dkernel.shape[0], *plan.columns)
        if plan.fsdp is None:
            return jax.lax.psum(dkernel, ("data", "fsdp"))
        return jax.lax.psum(collectives.scatter(dkernel, plan.fsdp), "data")

    specs = tuple(_activations(x.ndim, end) for end in plan.ends)
    return jax.shard_map(on_device, in_specs=specs, out_specs=plan.kernel, check_vma=False)(x, dy)


bilinear(_product, _to_input, _to_kernel)
bilinear(_to_input, _product, lambda dy, dx, plan: _to_kernel(dx, dy, plan))
bilinear(_to_kernel, lambda dkernel, dy, plan: _to_input(dy, dkernel, plan), _product)


def _gather(kernel, plan):
    return kernel if plan.fsdp is None else collectives.gather(kernel, plan.fsdp)


def _times(x, kernel):
    """x [..., D] times kernel [D, F]. On CPU as one matrix: XLA would transpose 3-D tokens in memory for the gradient
    of the kernel (a DiT^DH step took 14 % longer). Other platforms keep the axes: on TPU the reshape would be a copy.
    """

    def as_matrix(x, kernel):
        return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)

    return jax.lax.platform_dependent(x, kernel, cpu=as_matrix, cuda=_times_aligned, default=jnp.matmul)


def _outer(x, y):
    """x [..., D] and y [..., F] -> [D, F]: the sum of x y over all other axes."""

    def as_matrices(x, y):
        return _columns_product(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))

    return jax.lax.platform_dependent(x, y, cpu=as_matrices, cuda=_outer_aligned, default=_outer_general)


@functools.partial(jax.jit, inline=True)  # outside of jit the constraint would move x to a single device
def _columns_product(x, y):
    """The transpose of x [T, D] times y [T, F], for CPU, with the transpose written to memory.

    XLA's fast product on CPU cannot read its first operand by columns; the other product made the backward pass of
    DiT^DH-S take 12 % more CPU time. The layout makes XLA transpose the x that the forward pass left in memory.
    Without the layout XLA computes norm and modulation of the tokens again and writes them column by column, which
    takes five to ten times as long as a transpose.
    """
    rows = with_layout_constraint(x, Layout((0, 1)))
    return jax.lax.optimization_barrier(rows.T) @ y


def _outer_general(x, y):
    axes = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, y, ((axes, axes), ((), ())))


def _times_aligned(x, kernel):
    """For GPUs, which read rows of ALIGNED numbers: the head of DiT^DH has 5461 hidden channels."""
    y = jnp.matmul(_aligned(x), _aligned(_aligned(kernel), -2))
    return y[..., : kernel.shape[-1]]


def _outer_aligned(x, y):
    return _outer_general(_aligned(x), _aligned(y))[: x.shape[-1], : y.shape[-1]]


def _aligned(x, axis=-1):
    """x with zeros at the end of an axis, up to a multiple of ALIGNED."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, -x.shape[axis] % ALIGNED)
    return jnp.pad(x, pads)
