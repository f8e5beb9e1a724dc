"""Forward-mode derivatives of every model, and gradients of them, against the same models without rules of our own."""

import functools
import itertools

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


def _of_usual_size(path, x):
    """Scale standard normal numbers to what keeps activations near 1 in all layers of a deep network."""
    match path[-1].key:
        case "kernel":
            return x * np.float32((2 / np.prod(x.shape[:-1])) ** 0.5)
        case "scale" | "var":
            return np.exp(0.3 * x)
        case _:
            return 0.3 * x


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
    params = jax.tree_util.tree_map_with_path(_of_usual_size, random_like(variables, seed=2, scale=1.0))

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
    """Each array of u, du and the gradient to `tolerance` of its largest number, or of a tenth of its tree's largest.

    Rounding of a gradient grows with the largest gradient that it is summed from. Gradients of singular vectors before
    a norm are rounding alone.
    """
    for name, tree in expected.items():
        least = 0.1 * max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))
        for (path, a), b in zip(jax.tree.leaves_with_path(found[name]), jax.tree.leaves(tree), strict=True):
            largest = max(float(np.abs(b).max()), least)
            where = f"{name} {jax.tree_util.keystr(path)}"
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest, err_msg=where)


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


CHOICES = {
    "none": {},
    "dots": {"remat": "dots"},
    "full": {"remat": "full"},
    "unrolled": {"unroll": True, "remat": "dots"},
    "flash": {"attend": interpreted},
    "flash, dots": {"attend": interpreted, "remat": "dots"},
}
QUICK = ("dit", "dots")  # not slow
IN_CI = {("encoder", "none"), ("decoder", "full"), ("dit", "unrolled"), ("dit_dh", "dots"), ("dit_dh", "flash, dots")}
slow_transformers = [  # a choice of each kind in .ci/run; the others take many minutes
    pytest.param(*case, marks=[pytest.mark.slow, *(() if case in IN_CI else (pytest.mark.by_hand,))])
    for case in itertools.product(TRANSFORMERS, CHOICES)
    if case != QUICK
]


def _chosen(name, choice, **changes):
    changes |= CHOICES[choice]
    attend = changes.pop("attend", None)
    return _made(name, _config(**changes), attend)


@pytest.mark.parametrize("name, choice", [QUICK, *slow_transformers])
def test_derivatives_of_transformers_are_those_of_plain_products(name, choice):
    """Derivatives along the inputs, which include the times of DiTs, and the gradients of these derivatives."""
    _assert_close(_run(name, _chosen(name, choice)), _plain(name), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS + OTHERS)
def test_forward_and_backward_derivatives_are_transposes(name):
    """<jvp(v), w> = <v, vjp(w)>, and the derivative has gradients."""
    function, params, inputs, tangents = made = _made(name, _config())
    found = _run(name, made)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    weights = random_like(found["du"], seed=3, scale=1.0)
    pulled = jax.jit(lambda: jax.vjp(functools.partial(function, params), *inputs)[1](weights))()

    def inner(a, b):
        return sum(float(np.vdot(x, y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))

    size = np.sqrt(inner(tangents, tangents) * inner(pulled, pulled))
    assert abs(inner(found["du"], weights) - inner(tangents, pulled)) < 1e-5 * size


@pytest.mark.parametrize(
    "name, choice",
    [
        QUICK,
        *(case for case in slow_transformers if case.values[1] != "unrolled"),  # on a mesh every case is unrolled
        *(pytest.param(name, "none", marks=pytest.mark.slow) for name in OTHERS[:4]),  # convnet: see _run
    ],
)
def test_derivatives_are_the_same_on_a_mesh(name, choice):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    # Unrolled: on CPU, collectives behind a loop may meet those inside it (tests/stress/collectives.py).
    function, params, *rest = _chosen(name, choice, unroll=True)
    params = jax.device_put(params, sharding.shardings(params, mesh))
    place = sharding.replicated(mesh) if name == "discriminator" else sharding.batch_sharding(mesh)
    with uncached():
        found = sharding.jit(functools.partial(_outcome, function), mesh)(params, *jax.device_put(rest, place))
    _assert_close(found, _plain(name), 1e-4)


def _orders(function, x, v):
    """Derivatives of a function of x: up to the third order, forward and backward in every order, and of a batch."""

    def size(x):
        return jnp.square(function(x)).sum()

    def moved(x):
        u, du = jax.jvp(function, (x,), (v,))
        return jnp.square(u + du).sum()

    def curved(x):
        return jax.tree.reduce(jnp.add, jax.tree.map(lambda a: jnp.sin(a).sum(), jax.grad(size)(x)))

    batch = jax.tree.map(lambda *pair: jnp.stack(pair, 1), x, v)
    return {
        "forward": jax.jvp(function, (x,), (v,)),
        "backward": jax.grad(size)(x),
        "backward of forward": jax.grad(moved)(x),
        "forward of backward": jax.jvp(jax.grad(size), (x,), (v,))[1],
        "backward of backward": jax.grad(curved)(x),
        "backward of backward of forward": jax.jvp(jax.grad(moved), (x,), (v,))[1],
        "batch": jax.vmap(jax.grad(moved), 1)(batch),
        "batch of cotangents": jax.vmap(jax.vjp(function, x)[1])(jnp.stack([function(x), function(v)])),
    }


def test_all_derivatives_of_a_linear_layer_are_those_of_its_equation():
    def ours(x):
        return jnp.sin(Dense(4).apply({"params": {"kernel": x["kernel"], "bias": x["bias"]}}, jnp.tanh(x["x"])))

    def plain(x):
        return jnp.sin(jnp.tanh(x["x"]) @ x["kernel"] + x["bias"])

    shapes = {"x": (2, 5, 7), "kernel": (7, 4), "bias": (4,)}
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    x, v = (random_like(shapes, seed=seed, scale=1.0) for seed in (0, 1))
    found, expected = (jax.jit(_orders, static_argnums=0)(function, x, v) for function in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("attend", [attention.recomputed, interpreted], ids=["recomputed", "flash"])
def test_all_derivatives_of_attention_are_those_of_plain_attention(attend):
    x, v = jax.random.normal(jax.random.key(0), (2, 3, 2, 9, 2, 8))
    found, expected = (
        jax.jit(_orders, static_argnums=0)(lambda x, attend=attend: jnp.sin(attend(*x)), x, v)
        for attend in (attend, attention.xla)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


def test_cudnn_has_forward_derivatives(monkeypatch):
    """The rule around cuDNN's kernel, with XLA's function in the kernel's place."""
    monkeypatch.setattr(attention, "_by_cudnn", functools.partial(jax.nn.dot_product_attention, implementation="xla"))
    x, v = (tuple(inputs) for inputs in jax.random.normal(jax.random.key(0), (2, 3, 2, 9, 2, 8)))
    found, expected = (jax.jit(jax.jvp, static_argnums=0)(attend, x, v) for attend in (attention.cudnn, attention.xla))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_a_batch_of_models_is_each_of_them():
    """jax.vmap over parameters and inputs."""
    function, params, inputs, _ = _made("decoder", _config())
    params, inputs = jax.tree.map(lambda x: np.stack([x, 0.5 * x]), (params, inputs))
    found = jax.jit(jax.vmap(function))(params, *inputs)
    for i in range(2):
        expected = function(*jax.tree.map(lambda x: x[i], (params, *inputs)))  # noqa: B023
        np.testing.assert_allclose(found[i], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_no_product_is_computed_for_what_does_not_move():
    """One product forward; for a derivative one more per moved argument, for gradients one per differentiated one."""
    x, kernel = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((5, 7), jnp.float32)

    def product(x, kernel):
        return mesh_matmul.product(x, kernel, "kernel")[0]

    def size(x, kernel):
        return jnp.square(product(x, kernel)).sum()

    def moved(kernel, x):
        u, du = jax.jvp(lambda x: product(x, kernel), (x,), (x,))
        return (u * du).sum()

    def count(function, *arguments):
        return jaxpr_flops.count(function, *arguments) / (2 * 3 * 5 * 7)

    assert count(lambda x, kernel: jax.jvp(lambda x: product(x, kernel), (x,), (x,)), x, kernel) == 2
    assert count(lambda x, kernel: jax.jvp(product, (x, kernel), (x, kernel)), x, kernel) == 3
    assert [count(jax.grad(size, argnums=n), x, kernel) for n in (0, 1, (0, 1))] == [2, 2, 3]
    assert count(jax.grad(moved), kernel, x) == 4
