"""Forward-mode derivatives of every model, and gradients of them, against the same models without rules of our own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_like, tiny, uncached

from rae_jax.build import models as models_lib
from rae_jax.models import attention, mesh_matmul, sd_vae
from rae_jax.models.classifier import ConvNet
from rae_jax.models.dense import Dense
from rae_jax.models.discriminator import DiscriminatorHeads
from rae_jax.models.inception import Inception
from rae_jax.models.lpips import Lpips
from rae_jax.profiling import jaxpr_flops
from rae_jax.runtime import sharding

BATCH = 4
TRANSFORMERS = ("encoder", "decoder", "dit", "dit_dh")
OTHERS = ("sd_vae_encoder", "sd_vae_decoder", "discriminator", "lpips", "convnet", "inception")
interpreted = functools.partial(attention.flash, interpret=True)


def _config(**changes):
    config = tiny()
    config.dit.num_heads = config.dit.head_num_heads = 2
    config.update(changes)
    return config


def _model(name, config):
    """(module, shapes of the inputs by which it is differentiated, further inputs)."""
    images, latents = (BATCH, 16, 16, 3), (BATCH, 4, 4, 16)
    match name:
        case "encoder":
            return models_lib.autoencoder(config).encoder, [(BATCH, 32, 32, 3)], ()
        case "decoder":
            return models_lib.autoencoder(config).decoder, [latents], ()
        case "dit" | "dit_dh":
            config.dit.head_depth = int(name == "dit_dh")
            return models_lib.dit(config), [latents, (BATCH,)], (jnp.arange(BATCH) * 3,)
        case "sd_vae_encoder":
            return sd_vae.Encoder((32, 32), 1, latent_width=4), [images], ()
        case "sd_vae_decoder":
            return sd_vae.Decoder((32, 32), 1), [(BATCH, 8, 8, 4)], ()
        case "discriminator":
            return DiscriminatorHeads(), [(2, BATCH, 9, 16)], ()
        case "lpips":
            return Lpips(), [images, images], ()
        case "convnet":
            return ConvNet((8, 8), 10), [images], ()
        case "inception":
            return Inception(), [(2, 299, 299, 3)], ()


def _made(name, config, attend=None):
    """(function of params and inputs, params, inputs, tangents): weights and tangents are random, and none is zero."""
    module, shapes, rest = _model(name, config)
    module = module if attend is None else module.clone(attend=attend)
    inputs, tangents = (
        random_like([jax.ShapeDtypeStruct(s, "float32") for s in shapes], seed=i, scale=1.0) for i in (0, 1)
    )
    if name in ("dit", "dit_dh"):
        inputs[1] = np.linspace(0.1, 0.9, BATCH, dtype=np.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs, *rest)
    params = random_like(variables, seed=2, scale=0.1)
    params = jax.tree_util.tree_map_with_path(lambda path, x: x**2 if "var" in str(path[-1]) else x, params)

    def function(params, *inputs):
        return module.apply(params, *inputs, *rest)

    return function, params, inputs, tangents


def _outcome(function, params, inputs, tangents):
    """The result u, its derivative du along the tangents, and the gradient of |u + du|^2 for the params."""

    def loss(params):
        u, du = jax.jvp(functools.partial(function, params), inputs, tangents)
        return sum(jnp.square(a + b).mean() for a, b in zip(*map(jax.tree.leaves, (u, du)), strict=True)), (u, du)

    gradient, (u, du) = jax.grad(loss, has_aux=True)(params)
    return {"u": u, "du": du, "gradient": gradient}


def _assert_close(found, expected, tolerance):
    """Each array to `tolerance` of its largest number, or of a thousandth of the largest of all."""
    least = 1e-3 * max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        largest = max(float(np.abs(b).max()), least)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest, err_msg=jax.tree_util.keystr(path))


def _run(name, made):
    # Compiled as tests are, without optimisation, XLA computes x twice where the maximum's derivative compares the two.
    outcome = _outcome if name == "convnet" else jax.jit(_outcome, static_argnums=0)
    return outcome(*made)


@functools.cache
def _plain(name):
    """The outcome by jax's own derivatives: plain products, plain attention, nothing rematerialised."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mesh_matmul, "product", lambda x, kernel, name, parts=1: (x @ kernel, 1))
        return _run(name, _made(name, _config()))


@pytest.mark.parametrize("name", ["decoder", "dit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("encoder", "dit_dh"))])
def test_derivatives_of_transformers_are_those_of_plain_products(name):
    """Of inputs (a DiT's times as well), and the gradient of the derivative for the parameters."""
    _assert_close(_run(name, _made(name, _config())), _plain(name), 1e-5)


CHOICES = {
    "dots": {"remat": "dots"},
    "full": {"remat": "full"},
    "unrolled": {"unroll": True, "remat": "dots"},
    "flash": {"attend": interpreted},
    "flash, dots": {"attend": interpreted, "remat": "dots"},
}


@pytest.mark.parametrize(
    "name, choice",
    [
        ("decoder", "dots"),
        *(pytest.param(name, choice, marks=pytest.mark.slow) for name in TRANSFORMERS for choice in CHOICES),
    ],
)
def test_derivatives_do_not_depend_on_attention_and_rematerialisation(name, choice):
    changes = dict(CHOICES[choice])
    attend = changes.pop("attend", None)
    _assert_close(_run(name, _made(name, _config(**changes), attend)), _plain(name), 1e-5)


@pytest.mark.parametrize("name", ["convnet", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_forward_and_backward_derivatives_are_transposes(name):
    """<jvp(v), w> = <v, vjp(w)>, and the derivative has gradients."""
    function, params, inputs, tangents = made = _made(name, _config())
    found = _run(name, made)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found["gradient"]["params"]))
    weights = random_like(found["du"], seed=3, scale=1.0)
    pulled = jax.jit(lambda: jax.vjp(functools.partial(function, params), *inputs)[1](weights))()

    def inner(a, b):
        return sum(float(np.vdot(x, y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))

    size = np.sqrt(inner(tangents, tangents) * inner(pulled, pulled))
    assert abs(inner(found["du"], weights) - inner(tangents, list(pulled))) < 1e-4 * size


@pytest.mark.parametrize(
    "name, choice",
    [
        ("dit", "dots"),
        *(pytest.param(name, choice, marks=pytest.mark.slow) for name in TRANSFORMERS for choice in CHOICES),
        *(pytest.param(name, "full", marks=pytest.mark.slow) for name in OTHERS if name != "inception"),
    ],
)
def test_derivatives_are_the_same_on_a_mesh(name, choice):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    changes = dict(CHOICES[choice])
    attend = changes.pop("attend", None)
    # Unrolled: on CPU, collectives behind a loop may meet those inside it (tests/stress/collectives.py).
    function, params, inputs, tangents = _made(name, _config(**changes, unroll=True), attend)
    params = jax.device_put(params, sharding.shardings(params, mesh))
    rows = (inputs, tangents) if name != "discriminator" else ([], [])
    batch = jax.device_put(rows, sharding.batch_sharding(mesh))
    inputs, tangents = batch if name != "discriminator" else (inputs, tangents)
    with uncached():
        found = sharding.jit(functools.partial(_outcome, function), mesh)(params, inputs, tangents)
    _assert_close(found, _plain(name), 2e-5)
