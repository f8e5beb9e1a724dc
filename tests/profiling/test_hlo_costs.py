"""Compiled programs read: FLOPs and traffic by closed form, on simulated devices and of a TPU's text."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rae_jax.profiling import hlo_costs
from rae_jax.runtime import sharding

F32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


def _costs(function, *arguments, **options):
    return hlo_costs.Program(jax.jit(function, **options).lower(*arguments).compile().as_text()).costs()


def test_products_count_as_often_as_loops_run():
    def repeated(a, b):
        return jax.lax.fori_loop(0, 6, lambda _, x: jax.lax.scan(lambda c, _: (c @ b, None), x, length=2)[0], a)

    assert _costs(jnp.matmul, F32((3, 5)), F32((5, 7))).flops == 2 * 3 * 5 * 7
    assert _costs(repeated, F32((32, 64)), F32((64, 64))).flops == 12 * 2 * 32 * 64 * 64


def test_the_dearest_branch_counts():
    def branches(a):
        return jax.lax.cond(a[0, 0] > 0, lambda: a, lambda: a @ a @ a)

    assert _costs(branches, F32((64, 64))).flops == 2 * 2 * 64**3


@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_do_not_count_padding(stride):
    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    inside = 3 * 8 - 2 if stride == 1 else 3 * 4 - 1  # pairs of positions along an axis of 8 pixels
    assert _costs(convolve, F32((2, 8, 8, 6)), F32((3, 3, 6, 4))).flops == 2 * 2 * 6 * 4 * inside**2


def test_traffic_of_each_kind():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
    split = NamedSharding(mesh, P("fsdp"))

    def traffic(function, out):
        mapped = jax.shard_map(function, mesh=mesh, in_specs=P("fsdp"), out_specs=out, check_vma=False)
        x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=split)
        sent = _costs(lambda x: mapped(jnp.sin(x)), x).sent
        return {kind: size for kind, size in sent.items() if size}

    part, ring = 4 * 64 * 4, [(i, (i + 1) % 4) for i in range(4)]
    assert traffic(lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), P()) == {"all-gather": 3 * part}
    assert traffic(lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True), P("fsdp")) == {"reduce-scatter": 3 * part / 4}
    assert traffic(lambda x: jax.lax.psum(x, "data"), P("fsdp")) == {"all-reduce": 2 * part / 2}
    assert traffic(lambda x: jax.lax.ppermute(x, "fsdp", ring), P("fsdp")) == {"collective-permute": part}


def test_what_the_tpu_compiler_writes():
    """A loop whose count no note tells, a window that is mostly padding, a gather that goes on in a second fusion, a
    scattered sum written as an all-reduce and its slice, what it reckons an instruction takes.
    """
    program = hlo_costs.Program((Path(__file__).parents[1] / "goldens" / "tpu_program.hlo").read_text())
    costs = program.costs()
    sent = {"collective-permute": 4 * 256, "all-gather": 256, "reduce-scatter": 3 / 4 * 256}
    assert costs.sent == {**dict.fromkeys(hlo_costs.COLLECTIVES, 0), **sent}
    assert costs.cycles == 4 * 100 + 1000
    assert costs.flops == 2 * (16 * 8 * 4) * 2  # of the window's four pairs of positions two meet the input
    assert ("bf16", (16, 2, 4)) in program.arrays()
