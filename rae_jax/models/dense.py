"""The linear layer, and its product on a mesh: the batch stays split, the kernel travels once each way.

Left to itself, XLA's partitioner may gather the whole batch's activations to meet a split kernel, sum gradients up on
every device before it splits them, or turn products into rings of small ones that take minutes to compile.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from rae_jax.runtime import collectives, sharding

ALIGNED = 8  # 16 bytes of bfloat16, which the units of an NVIDIA GPU that load tiles of a matrix ask for
PRODUCT = "product"  # the name by which a backward pass may find results again, see layers.scan_blocks


class Dense(nn.Module):
    """[B, ..., D] -> [B, ..., features], or a tuple of `parts` equal parts of it. Products run in `dtype`.

    Under remat='dots' a backward pass finds the result again, unless it is not `kept`.
    """

    features: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros
    parts: int = 1
    kept: bool = True

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        name = "/".join((*self.path, "kernel"))
        y, pieces = product(x.astype(self.dtype), kernel.astype(self.dtype), name, self.parts)
        # Added to the parts, not before: a gradient of the bias would put them together again in memory.
        biases = jnp.split(bias.astype(self.dtype), self.parts)
        found = tuple(part + b for part, b in zip(_parts(y, pieces, self.parts), biases, strict=True))
        if self.kept:
            found = tuple(checkpoint_name(part, PRODUCT) for part in found)
        return found if self.parts > 1 else found[0]


def product(x, kernel, name, parts=1):
    """x [B, ..., D] times kernel [D, F] -> ([B, ..., F], pieces); `name` is the end of the kernel's path.

    Inside sharding.jit, where the mesh divides B: every device gathers the kernel, in its own dtype, multiplies its
    part of the batch, and drops it; the kernel's gradient is summed up straight into the parts that the devices hold.
    Where the tensor axis splits F, that is in so many pieces, each of which has a piece of every one of the `parts`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return _times(x, kernel), 1
    fsdp, tensor = sharding.place(name, kernel.shape, mesh.shape)
    pieces = mesh.shape["tensor"] if tensor == "column" else 1
    if pieces > 1 and parts > 1:
        kernel = kernel.reshape(kernel.shape[0], parts, -1)
    return _product(x, kernel, _plan(fsdp, tensor, kernel.ndim)), pieces


def _parts(y, pieces, parts):
    """The parts of a product [B, ..., F]."""
    if pieces == 1 or parts == 1:
        return tuple(jnp.split(y, parts, -1))
    y = y.reshape(*y.shape[:-1], pieces, parts, -1)
    return tuple(y[..., i, :].reshape(*y.shape[:-3], -1) for i in range(parts))


class _Plan(NamedTuple):
    """How a kernel lies on the mesh while it is used, and what it multiplies and makes."""

    fsdp: int | None  # which axis is gathered
    tensor: str | None  # 'column', 'row'
    kernel: P
    ends: tuple  # the mesh's axis of the last axis of x, and of the product


def _plan(fsdp, tensor, ndim):
    first = [axis for axis, there in (("tensor", tensor == "row"), ("fsdp", fsdp == -2)) if there]
    last = [axis for axis, there in (("tensor", tensor == "column"), ("fsdp", fsdp == -1)) if there]
    kernel = P(tuple(first) or None, *(None,) * (ndim - 2), tuple(last) or None)
    ends = tuple("tensor" if tensor == kind else None for kind in ("row", "column"))
    return _Plan({None: None, -2: 0, -1: ndim - 1}[fsdp], tensor, kernel, ends)


def _activations(ndim, last):
    return P(*sharding.BATCH, *(None,) * (ndim - 2), last)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, kernel, plan):
    def on_device(x, kernel):
        whole = _gather(kernel, plan)
        y = _times(x, whole.reshape(whole.shape[0], -1))
        return jax.lax.psum(y, "tensor") if plan.tensor == "row" else y

    left, right = (_activations(x.ndim, end) for end in plan.ends)
    return jax.shard_map(on_device, in_specs=(left, plan.kernel), out_specs=right, check_vma=False)(x, kernel)


def _forward(x, kernel, plan):
    return _product(x, kernel, plan), (x, kernel)  # not the gathered kernel: it is gathered again


def _backward(plan, kept, dy):
    def on_device(x, kernel, dy):
        whole = _gather(kernel, plan)
        dx = _times(dy, whole.reshape(whole.shape[0], -1).T)
        if plan.tensor == "column":
            dx = jax.lax.psum(dx, "tensor")
        dkernel = _outer(x, dy).reshape(whole.shape)
        if plan.fsdp is None:
            return dx, jax.lax.psum(dkernel, ("data", "fsdp"))
        return dx, jax.lax.psum(collectives.scatter(dkernel, plan.fsdp), "data")

    x, kernel = kept
    left, right = (_activations(x.ndim, end) for end in plan.ends)
    specs = {"in_specs": (left, plan.kernel, right), "out_specs": (left, plan.kernel), "check_vma": False}
    return jax.shard_map(on_device, **specs)(x, kernel, dy)


_product.defvjp(_forward, _backward)


def _gather(kernel, plan):
    return kernel if plan.fsdp is None else collectives.gather(kernel, plan.fsdp)


def _times(x, kernel):
    """x [..., D] times kernel [D, F]. On CPU as one matrix: XLA would transpose 3-D tokens in memory for the kernel's
    gradient (a DiT^DH step took 14 % longer). Elsewhere as it is: on TPU the reshape would be the copy.
    """

    def as_matrix(x, kernel):
        return _matrix_product(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)

    return jax.lax.platform_dependent(x, kernel, cpu=as_matrix, cuda=_times_aligned, default=jnp.matmul)


def _outer(x, y):
    """Sum over all other axes of x [..., D] times y [..., F] -> [D, F]."""

    def as_matrices(x, y):
        return _columns_product(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))

    return jax.lax.platform_dependent(x, y, cpu=as_matrices, cuda=_outer_aligned, default=_outer_as_they_are)


@jax.custom_vjp
def _matrix_product(x, kernel):
    """x [T, D] times kernel [D, F], for CPU."""
    return x @ kernel


def _matrix_gradients(kept, dy):
    x, kernel = kept
    return dy @ kernel.T, _columns_product(x, dy)


_matrix_product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _matrix_gradients)


def _columns_product(x, y):
    """x [T, D] transposed times y [T, F]. Transposed in memory: the fast one of XLA's products on CPU takes no first
    operand that is to be read by columns, and DiT^DH-S's backward pass took 12 % more CPU time by the other.

    What is transposed is x as it lies there for the forward pass: told nothing, XLA computes the normed and modulated
    tokens once more and writes them column by column, which takes five to ten times as long as transposing them.
    """
    rows = with_layout_constraint(x, Layout((0, 1)))
    return jax.lax.optimization_barrier(rows.T) @ y


def _outer_as_they_are(x, y):
    axes = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, y, ((axes, axes), ((), ())))


def _times_aligned(x, kernel):
    """For GPUs, which read rows of whole ALIGNED numbers: the head of DiT^DH has 5461 hidden channels."""
    y = jnp.matmul(_aligned(x), _aligned(_aligned(kernel), -2))
    return y[..., : kernel.shape[-1]]


def _outer_aligned(x, y):
    return _outer_as_they_are(_aligned(x), _aligned(y))[: x.shape[-1], : y.shape[-1]]


def _aligned(x, axis=-1):
    """x with zeros at the end of an axis, up to a multiple of ALIGNED."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, -x.shape[axis] % ALIGNED)
    return jnp.pad(x, pads)
