"""MF-RAE's student on random weights is the reference for ours (../shared/data/goldens)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dit_cases import Case, config_of
from golden_cases import GOLDENS, nhwc, relative

from rae_jax.build import models, part_weights, published_weights
from rae_jax.diffusion import flow
from rae_jax.runtime import sharding
from rae_jax.training import few_step

pytestmark = pytest.mark.skipif(not GOLDENS.is_dir(), reason="../shared/data/goldens is not here")
DIFFERENCES = functools.partial(few_step.by_differences, size=5e-3)


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDENS / "mf_student.npz")


def _load(name, part):
    pytest.importorskip("torch", reason="the goldens' weights are torch files")
    config = config_of(Case(trunk=(32, 2, 2), head=(48, 2, 3), num_classes=9))
    config[part].weights = str(GOLDENS / f"{name}.pt")
    return part_weights.load(config, part, "", sharding.make_mesh(config.mesh)), config


@pytest.fixture(scope="module")
def networks():
    """(config, student's parameters, teacher's parameters)."""
    student, config = _load("mf_student", "few_step")
    return config, student, _load("mf_teacher", "dit")[0]


def _u(config, params, z, r, t, labels):
    return models.dit(config, mean_velocity=True).apply({"params": params}, z, t, labels, r=r)


def test_mean_velocities_and_one_step_are_the_authors(networks, golden):
    config, student, _ = networks
    noise, labels = nhwc(golden["noise"]), golden["y"]
    u = jax.jit(lambda r, t: _u(config, student, noise, r, t, labels))
    assert relative(u(golden["r"], golden["t"]), nhwc(golden["u"])) < 1e-5
    ends = jnp.zeros(3), jnp.ones(3)
    assert relative(noise - u(*ends), nhwc(golden["one_step"])) < 1e-5


def _losses(networks, golden, student, derivative=DIFFERENCES):
    """Return (loss, mean square) of each image."""
    config, _, teacher = networks
    x, noise = (nhwc(golden[name]) for name in ("x", "noise"))
    r, t = (jnp.asarray(golden[name]) for name in ("r", "t"))
    z = flow.interpolate(x, noise, t)
    v = models.dit(config).apply({"params": teacher}, z, t, golden["y"])
    fixed = functools.partial(_u, config, jax.lax.stop_gradient(student), labels=golden["y"])
    wanted = few_step.target(fixed, z, r, t, v, derivative)
    errors = jnp.square(_u(config, student, z, r, t, golden["y"]) - wanted)
    return few_step.balanced(errors.sum((1, 2, 3)), 1.0), errors.mean()


def test_losses_and_gradients_are_the_authors(networks, golden):
    config, student, _ = networks
    losses, mean_square = jax.jit(lambda params: _losses(networks, golden, params))(student)
    np.testing.assert_allclose(losses, golden["mfd_loss"], rtol=1e-5)
    np.testing.assert_allclose(mean_square, golden["mfd_ref"], rtol=1e-5)
    ours = jax.jit(jax.grad(lambda params: _losses(networks, golden, params)[0].mean()))(student)
    ours = published_weights.tensors_of(config, "few_step", ours)
    theirs = {k.removeprefix("grad_mfd/"): golden[k] for k in golden.files if k.startswith("grad_mfd/")}
    assert len(theirs) > 60
    for key, b in theirs.items():
        assert jnp.abs(ours[key] - b).max() <= 1e-4 * jnp.abs(b).max(), key


def test_differences_approach_the_exact_derivative(networks, golden):
    """Their error is of the order of the square of their size."""
    config, student, _ = networks
    z, r, t = nhwc(golden["noise"]), jnp.asarray(golden["r"]), jnp.asarray(golden["t"])
    v = nhwc(golden["x"])

    def u(z, t):
        return _u(config, student, z, r, t, golden["y"])

    exact = jax.jit(lambda: few_step.by_jvp(u, z, t, v))()
    errors = [relative(jax.jit(lambda s=s: few_step.by_differences(u, z, t, v, s))(), exact) for s in (2e-2, 1e-2)]
    assert errors[1] < 0.05 and 3.0 < errors[0] / errors[1] < 5.0
