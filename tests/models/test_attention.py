"""Attention by XLA and by kernels: equal results on platforms that run them; compiled or refused on other platforms."""

import functools
import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny

from rae_jax.build import models
from rae_jax.config import checks
from rae_jax.errors import UserError
from rae_jax.models import attention
from rae_jax.models.dense import PRODUCT
from rae_jax.profiling import jaxpr_flops
from rae_jax.runtime import sharding


def _value_and_pullback(attend, shape, dtype="float32"):
    q, k, v, cotangent = jax.random.normal(jax.random.key(0), (4, *shape), dtype)
    out, pullback = jax.vjp(attend, q, k, v)
    assert out.dtype == q.dtype
    return [np.asarray(a, np.float32) for a in (out, *pullback(cotangent))]


def _assert_equal(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_attention_on_cpu_is_attention(dtype, tolerance):
    """Compare values and gradients of the CPU's branch with jax.nn's attention, which other platforms take."""
    ours, theirs = (
        _value_and_pullback(attend, (2, 9, 3, 8), dtype) for attend in (attention.xla, jax.nn.dot_product_attention)
    )
    _assert_equal(ours, theirs, tolerance)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_recomputed_weights_make_the_same_gradients(dtype, tolerance):
    ours, theirs = (_value_and_pullback(a, (2, 9, 3, 8), dtype) for a in (attention.recomputed, attention.xla))
    _assert_equal(ours, theirs, tolerance)


def test_the_backward_pass_makes_the_weights_once_more_and_no_more():
    """Two products forward, four of gradients, one for the weights; the result is kept and not computed again."""
    kept = jax.checkpoint_policies.save_only_these_names(PRODUCT)
    inputs = jax.ShapeDtypeStruct((3, 2, 16, 4, 8), "float32")

    def count(attend):
        block = jax.checkpoint(lambda x: jnp.sin(attend(*x)).sum(), policy=kept)
        return jaxpr_flops.count(jax.grad(block), inputs)

    product = 2 * 2 * 4 * 16 * 16 * 8
    assert count(attention.recomputed) == 7 * product
    assert count(attention.xla) == 8 * product


@pytest.mark.parametrize("length", [8, 9])
def test_an_odd_token_more_is_masked_out(length, monkeypatch):
    """Gradients by the code around cuDNN's kernel, with XLA's function of the same arguments in the kernel's place."""
    monkeypatch.setattr(attention, "_by_cudnn", functools.partial(jax.nn.dot_product_attention, implementation="xla"))
    ours, theirs = (_value_and_pullback(attend, (2, length, 3, 8)) for attend in (attention.cudnn, attention.xla))
    _assert_equal(ours, theirs, 1e-6)


@pytest.mark.parametrize("length", [40, *(pytest.param(n, marks=pytest.mark.slow) for n in (128, 257))])
def test_the_flash_kernel_is_attention(length):
    """Compare values and gradients of the interpreted kernel, also for a last block that is filled up."""
    flash = jax.jit(functools.partial(attention.flash, interpret=True))
    _assert_equal(
        _value_and_pullback(flash, (2, length, 2, 8)), _value_and_pullback(attention.xla, (2, length, 2, 8)), 3e-6
    )


def test_the_flash_kernel_runs_on_each_devices_part():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    q, k, v = jax.random.normal(jax.random.key(0), (3, 4, 8, 2, 8))

    @jax.jit
    def on_mesh(q, k, v):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attention.flash(q, k, v, interpret=True)

    placed = jax.device_put((q, k, v), sharding.batch_sharding(mesh))
    found = on_mesh(*placed)
    assert {shard.data.shape for shard in found.addressable_shards} == {(1, 8, 1, 8)}
    np.testing.assert_allclose(found, attention.xla(q, k, v), rtol=1e-6, atol=1e-6)


def test_the_config_names_it():
    config = tiny()
    functions = {"xla": attention.xla, "cudnn": attention.cudnn, "flash": attention.flash}
    for config.attention, attend in functions.items():
        autoencoder = models.autoencoder(config)
        modules = (autoencoder.encoder, autoencoder.decoder, models.dit(config))
        assert all(module.attend is attend for module in modules)
    config.attention, config.remat = "xla", "dots"
    assert models.dit(config).attend is attention.recomputed


@pytest.mark.parametrize("name, fix", [("cudnn", "Hopper"), ("flash", "TPU"), ("sparse", "choose one of")])
def test_what_the_platform_lacks_is_refused_in_one_line(name, fix):
    config = tiny()
    config.attention = name
    with pytest.raises(UserError, match=rf"config.attention='{name}' cannot work: .*{fix}") as refused:
        checks.check(config, sharding.make_mesh(config.mesh))
    assert "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu (the extra tpu)")
def test_the_flash_kernel_compiles_for_tpu():
    """Forward and backward are one kernel each, and every device has its own part: no array is gathered."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == ["2 False"] * 3


def _compile_for_tpu():
    from jax.experimental import topologies

    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, devices)
    for length, heads, width in (
        (1024, 16, 72),
        (1024, 16, 128),
        (257, 12, 64),
    ):  # trunk, head, decoder
        x = jax.ShapeDtypeStruct((4, length, heads, width), "bfloat16", sharding=sharding.batch_sharding(mesh))

        def value_and_pullback(q, k, v, cotangent):
            # conftest sets 'highest', for which Mosaic compiles no product of bfloat16.
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), jax.default_matmul_precision("default"):
                out, pullback = jax.vjp(attention.flash, q, k, v)
                return out, pullback(cotangent)

        program = jax.jit(value_and_pullback).trace(x, x, x, x).lower(lowering_platforms=("tpu",)).compile().as_text()
        print(program.count("tpu_custom_call"), "all-gather" in program)


if __name__ == "__main__":
    _compile_for_tpu()
