"""FLOPs by closed form, and by the paper's numbers for the models."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from configs import dit_b
from rae_jax.build import models
from rae_jax.config.keys import latent_shape
from rae_jax.profiling import jaxpr_flops
from rae_jax.runtime import sharding

A, B = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((5, 7), jnp.float32)
PRODUCT = 2 * 3 * 5 * 7


def test_a_product_and_its_gradients():
    assert jaxpr_flops.count(jnp.dot, A, B) == PRODUCT
    assert (
        jaxpr_flops.count(jax.value_and_grad(lambda a, b: jnp.square(a @ b).sum(), argnums=(0, 1)), A, B) == 3 * PRODUCT
    )


def test_products_of_batches():
    q = jax.ShapeDtypeStruct((2, 9, 4, 8), jnp.bfloat16)
    assert jaxpr_flops.count(lambda q, k: jnp.einsum("bqhk,bshk->bhqs", q, k), q, q) == 2 * 2 * 4 * 9 * 9 * 8


def test_convolutions():
    images, kernel = jax.ShapeDtypeStruct((2, 8, 8, 6), jnp.float32), jax.ShapeDtypeStruct((3, 3, 6, 4), jnp.float32)
    grouped = jax.ShapeDtypeStruct((3, 3, 3, 4), jnp.float32)

    def convolve(x, w, groups=1):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=layout, feature_group_count=groups)

    assert jaxpr_flops.count(convolve, images, kernel) == 2 * (2 * 4 * 4 * 4) * (3 * 3 * 6)
    assert jaxpr_flops.count(lambda x, w: convolve(x, w, 2), images, grouped) == 2 * (2 * 4 * 4 * 4) * (3 * 3 * 3)


def test_loops_count_as_often_as_they_turn():
    square = jax.ShapeDtypeStruct((4, 4), jnp.float32)

    def repeated(a):
        return jax.lax.fori_loop(0, 6, lambda i, x: jax.lax.scan(lambda c, _: (c @ a, None), x, length=2)[0], a)

    assert jaxpr_flops.count(repeated, square) == 12 * 2 * 4**3


def test_what_each_device_does_is_counted_for_all():
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
    rows = jax.ShapeDtypeStruct((16, 5), jnp.float32)
    split = {"in_specs": (sharding.BATCH, P()), "out_specs": sharding.BATCH}
    on_mesh = jax.shard_map(jnp.dot, mesh=mesh, **split)
    assert jaxpr_flops.count(on_mesh, rows, B) == jaxpr_flops.count(jnp.dot, rows, B) == 2 * 16 * 5 * 7


def test_the_dearest_branch_counts_and_what_is_computed_again_counts_again():
    def dear(a, b):
        return jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: a @ b @ b.T @ b)

    assert jaxpr_flops.count(jax.jit(dear), A, B) == 3 * PRODUCT

    def sines(a, b):
        return jnp.sin(jnp.sin(a @ b)).sum()

    gradient = jax.grad(jax.checkpoint(sines), argnums=(0, 1))
    assert jaxpr_flops.count(gradient, A, B) == 4 * PRODUCT


def test_of_what_platforms_do_in_their_own_ways_the_default_counts():
    def product(a, b):
        return jax.lax.platform_dependent(a, b, tpu=lambda a, b: a @ b @ b.T @ b, default=jnp.matmul)

    assert jaxpr_flops.count(product, A, B) == PRODUCT
    assert (
        jaxpr_flops.count(jax.grad(lambda a, b: jnp.square(product(a, b)).sum(), argnums=(0, 1)), A, B) == 3 * PRODUCT
    )


@pytest.mark.parametrize("size, giga_products", [("s", 48.5), ("b", 65.7), ("l", 123.6), ("xl", 161.6)])
def test_the_papers_models(size, giga_products):
    """Forward multiplications with additions for 256 tokens, in the reference's table."""
    config = dit_b.get_config()
    config.dit.update(dit_b.DITS[size])
    model = models.dit(config)
    x, t = jax.ShapeDtypeStruct((1, *latent_shape(config)), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), x, t, labels)
    assert jaxpr_flops.count(model.apply, params, x, t, labels) / 2e9 == pytest.approx(giga_products, rel=2e-3)
