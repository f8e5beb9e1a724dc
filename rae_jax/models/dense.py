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
from jax.sharding import PartitionSpec as P

from rae_jax import sharding

PRODUCT = "product"  # the name by which a backward pass may find results again, see layers.scan_blocks


class Dense(nn.Module):
    """[B, ..., D] -> [B, ..., features], or a tuple of `parts` equal parts of it. Products run in `dtype`."""

    features: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()
    bias_init: Callable = nn.initializers.zeros
    parts: int = 1

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        name = "/".join((*self.path, "kernel"))
        y = product(x.astype(self.dtype), kernel.astype(self.dtype), name, self.parts)  # [B, ..., parts, F / parts]
        y = checkpoint_name(y + bias.astype(self.dtype).reshape(self.parts, -1), PRODUCT)
        return tuple(y[..., i, :] for i in range(self.parts)) if self.parts > 1 else y[..., 0, :]


def product(x, kernel, name, parts=1):
    """x [B, ..., D] times kernel [D, F] -> [B, ..., parts, F / parts]; `name` is the end of the kernel's path.

    Inside sharding.jit, where the mesh divides B: every device gathers the kernel, in its own dtype, multiplies its
    part of the batch, and drops it; the kernel's gradient is summed up straight into the parts that the devices hold.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kernel = kernel.reshape(kernel.shape[0], parts, -1)
    if mesh.empty or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return _times(x, kernel)
    return _product(x, kernel, _plan(name, kernel.shape, parts, mesh.shape))


class _Plan(NamedTuple):
    """How a kernel [D, parts, F] lies on the mesh while it is used."""

    fsdp: int | None  # which axis is gathered
    tensor: str | None  # 'column', 'row'
    kernel: P
    left: P  # of what it multiplies, and of the product, but for the axes between the first and the last
    right: P


def _plan(name, shape, parts, sizes):
    fsdp, tensor = sharding.place(name, (shape[0], parts * shape[2]), sizes)
    split = {0: [], 2: []}
    if tensor:
        split[2 if tensor == "column" else 0].append("tensor")
    if fsdp is not None:
        split[0 if fsdp == -2 else 2].append("fsdp")
    kernel = P(tuple(split[0]) or None, None, tuple(split[2]) or None)
    ends = {"left": "tensor" if tensor == "row" else None, "right": "tensor" if tensor == "column" else None}
    return _Plan({None: None, -2: 0, -1: 2}[fsdp], tensor, kernel, *(P(*sharding.BATCH, end) for end in ends.values()))


def _between(spec, ndim):
    """The spec of an array of `ndim` axes with nothing split between its first and its last."""
    return P(spec[0], *(None,) * (ndim - 2), spec[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, kernel, plan):
    def on_device(x, kernel):
        y = _times(x, _gather(kernel, plan))
        return jax.lax.psum(y, "tensor") if plan.tensor == "row" else y

    left, right = _between(plan.left, x.ndim), _between(plan.right, x.ndim + 1)
    return jax.shard_map(on_device, in_specs=(left, plan.kernel), out_specs=right, check_vma=False)(x, kernel)


def _forward(x, kernel, plan):
    return _product(x, kernel, plan), (x, kernel)  # not the gathered kernel: it is gathered again


def _backward(plan, kept, dy):
    def on_device(x, kernel, dy):
        dy = dy.reshape(*x.shape[:-1], -1)  # [B, ..., parts * F]
        whole = _gather(kernel, plan)
        dx = _times(dy, whole.reshape(whole.shape[0], 1, -1).transpose(2, 1, 0))[..., 0, :]
        if plan.tensor == "column":
            dx = jax.lax.psum(dx, "tensor")
        dkernel = _outer(x, dy).reshape(whole.shape)
        if plan.fsdp is None:
            return dx, jax.lax.psum(dkernel, ("data", "fsdp"))
        dkernel = jax.lax.psum_scatter(dkernel, "fsdp", scatter_dimension=plan.fsdp, tiled=True)
        return dx, jax.lax.psum(dkernel, "data")

    x, kernel = kept
    left, right = _between(plan.left, x.ndim), _between(plan.right, x.ndim + 1)
    specs = {"in_specs": (left, plan.kernel, right), "out_specs": (left, plan.kernel), "check_vma": False}
    return jax.shard_map(on_device, **specs)(x, kernel, dy)


_product.defvjp(_forward, _backward)


def _gather(kernel, plan):
    return kernel if plan.fsdp is None else jax.lax.all_gather(kernel, "fsdp", axis=plan.fsdp, tiled=True)


def _times(x, kernel):
    """x [..., D] times kernel [D, parts, F]. On CPU as one matrix: XLA would transpose 3-D tokens in memory for the
    kernel's gradient (a DiT^DH step took 14 % longer). Elsewhere as it is: on TPU the reshape would be the copy.
    """
    shape, kernel = (*x.shape[:-1], *kernel.shape[1:]), kernel.reshape(kernel.shape[0], -1)

    def as_matrix(x, kernel):
        return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)

    return jax.lax.platform_dependent(x, kernel, cpu=as_matrix, default=jnp.matmul).reshape(shape)


def _outer(x, y):
    """Sum over all other axes of x [..., D] times y [..., F] -> [D, F]."""

    def as_matrices(x, y):
        return x.reshape(-1, x.shape[-1]).T @ y.reshape(-1, y.shape[-1])

    def as_they_are(x, y):
        axes = tuple(range(x.ndim - 1))
        return jax.lax.dot_general(x, y, ((axes, axes), ((), ())))

    return jax.lax.platform_dependent(x, y, cpu=as_matrices, default=as_they_are)
