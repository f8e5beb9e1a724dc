"""The networks that compare images: how exactly they compute."""

import jax
import numpy as np
import pytest
from jax import extend

from rae_jax.build import perceptual_networks
from rae_jax.inference import perceptual_metrics

IMAGES = np.zeros((2, 32, 32, 3), np.float32)


def _precisions(jaxpr):
    """Yield the precision of each product and convolution of a program and of the programs that it calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation.params["precision"]
        for inner in extend.core.jaxprs_in_params(equation.params):
            yield from _precisions(inner)


@pytest.mark.parametrize("part, products", [("lpips", 26), ("inception", 95)])
def test_metrics_take_no_short_cuts_in_float32(part, products):
    """A TPU would round float32 to bfloat16, a GPU to TF32; on a CPU there is no difference to be seen."""
    params = perceptual_networks.part_shapes(part)
    programs = {
        "lpips": lambda params: perceptual_metrics.compare({"lpips": params}, IMAGES, IMAGES)["lpips"],
        "inception": lambda params: perceptual_metrics.features(params, IMAGES),
    }
    with jax.default_matmul_precision("default"):
        found = list(_precisions(jax.make_jaxpr(programs[part])(params).jaxpr))
    highest = jax.lax.Precision.HIGHEST
    assert len(found) >= products and set(found) == {(highest, highest)}, found
