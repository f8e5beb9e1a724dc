"""softmax(q k^T / sqrt(K)) v for q, k, v [B, N, H, K], by XLA and by kernels that never hold the N x N weights.

Products run in the dtype of q, k, v, the softmax in float32. config.attention names one of them.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from rae_jax.models.dense import PRODUCT
from rae_jax.models.derivatives import with_backward
from rae_jax.runtime import sharding

LANES = 128  # of a TPU: the flash kernel's blocks are multiples
LARGEST_BLOCK = 512


def xla(q, k, v):
    """Attention by XLA, on every platform.

    On CPU the heads are moved to the front: XLA's fast product of batched matrices needs this order. Without it,
    attention takes 1.6 times as long (DINOv2-B's shapes; the gradients of the small DiT twice as long).
    """

    def heads_first(q, k, v):
        q, k, v = (_heads(a) for a in (q, k, v))
        weights = jax.nn.softmax(_logits(q, k)).astype(v.dtype)
        return _heads(jnp.einsum("bhqs,bhsk->bhqk", weights, v))

    return jax.lax.platform_dependent(q, k, v, cpu=heads_first, default=jax.nn.dot_product_attention)


def recomputed(q, k, v):
    """Attention as `xla`, with a backward pass that keeps no N x N weights: it computes only the weights again.

    Without it XLA computes the weights again for each product: in a head of DiT^DH-XL ten times.
    """
    return with_backward(xla, _recomputed_forward, _recomputed_backward, xla)(q, k, v)


def _recomputed_forward(q, k, v):
    logits = _logits(_heads(q), _heads(k))
    norm = jax.nn.logsumexp(logits, -1, keepdims=True)
    weights = jnp.exp(logits - norm).astype(v.dtype)
    x = _heads(jnp.einsum("bhqs,bhsk->bhqk", weights, _heads(v)))
    x, norm = (checkpoint_name(a, PRODUCT) for a in (x, norm))
    return x, (x, norm)


def _recomputed_backward(inputs, residuals, dx):
    x, norm = residuals
    q, k, v, x, dx = (_heads(a) for a in (*inputs, x, dx))
    # The barrier: computed once, for both products that need them.
    weights = jax.lax.optimization_barrier(jnp.exp(_logits(q, k) - norm).astype(v.dtype))
    dv = jnp.einsum("bhqs,bhqk->bhsk", weights, dx)
    dweights = jnp.einsum("bhqk,bhsk->bhqs", dx, v, preferred_element_type=jnp.float32)
    mean = (dx.astype(jnp.float32) * x).sum(-1, keepdims=True)
    dlogits = (weights * (dweights - mean) * q.shape[-1] ** -0.5).astype(q.dtype)
    dq = jnp.einsum("bhqs,bhsk->bhqk", dlogits, k)
    dk = jnp.einsum("bhqs,bhqk->bhsk", dlogits, q)
    return tuple(_heads(a) for a in (dq, dk, dv))


def _heads(x):
    """[B, N, H, K] -> [B, H, N, K], and back."""
    return x.transpose(0, 2, 1, 3)


def _logits(q, k):
    return jnp.einsum("bhqk,bhsk->bhqs", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5


def _kernel(function, differentiable):
    """Return attention by a kernel, with the gradients of `differentiable` and all other derivatives of `xla`."""
    forward = functools.partial(jax.vjp, differentiable)
    return with_backward(function, forward, lambda _, pullback, dx: pullback(dx), xla)


_by_cudnn = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


def cudnn(q, k, v):
    """Attention by cuDNN: NVIDIA GPUs from Hopper on, bfloat16, K a multiple of 8."""
    return _kernel(_by_cudnn, _cudnn_even)(q, k, v)


def _cudnn_even(q, k, v):
    """Return attention by cuDNN with gradients. JAX has them for even token counts: one masked token may be added."""
    length = q.shape[1]
    if length % 2 == 0:
        return _by_cudnn(q, k, v)
    q, k, v = (jnp.pad(a, ((0, 0), (0, 1), (0, 0), (0, 0))) for a in (q, k, v))
    lengths = dict.fromkeys(("query_seq_lengths", "key_value_seq_lengths"), jnp.full(q.shape[:1], length, jnp.int32))
    return _by_cudnn(q, k, v, **lengths)[:, :length]


def flash(q, k, v, *, interpret=False):
    """Attention by JAX's splash kernel for TPU, which is faster for sequences of a thousand tokens and more.

    Inside sharding.jit each device runs it on its part of the batch and, if the mesh divides them, of the heads.
    `interpret` runs the kernel step by step on any platform, for tests.
    """
    function = functools.partial(_flash_on_mesh, interpret=interpret)
    return _kernel(function, function)(q, k, v)


def _flash_on_mesh(q, k, v, *, interpret):
    mesh = sharding.current_mesh()
    kernel = functools.partial(_flash, interpret=interpret)
    if mesh is None or q.shape[0] % sharding.ways(mesh):
        return kernel(q, k, v)
    heads = "tensor" if q.shape[2] % mesh.shape["tensor"] == 0 else None
    split = P(*sharding.BATCH, None, heads, None)
    # The kernel's checks do not know how values vary over the mesh.
    return jax.shard_map(kernel, in_specs=(split,) * 3, out_specs=split, check_vma=False)(q, k, v)


def _flash(q, k, v, *, interpret):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads, width = q.shape[1:]
    padded = -(-length // LANES) * LANES
    block = math.gcd(padded, LARGEST_BLOCK)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask((padded, padded))] * heads),
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, block), use_fused_bwd_kernel=True),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        residual_checkpoint_name=PRODUCT,  # remat='dots' keeps the result
    )
    q = (q * width**-0.5).astype(q.dtype)  # the kernel does not scale
    q, k, v = (_heads_first(a, padded) for a in (q, k, v))
    # Tokens attend only to their segment: the tokens that fill up the last block are another segment.
    segment = (jnp.arange(padded) >= length).astype(jnp.int32)
    segments = splash.SegmentIds(q=segment, kv=segment) if padded > length else None
    x = jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, segments)
    return x[:, :, :length].transpose(0, 2, 1, 3)


def _heads_first(x, length):
    """[B, N, H, K] -> [B, H, length, K], filled up with zeros."""
    return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, length - x.shape[1]), (0, 0)))
