"""The authors' PyTorch modules, run on random weights, are the reference for ours (../shared/data/goldens)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dit_cases import Case, config_of
from golden_cases import GOLDENS, nhwc, relative

from rae_jax.build import models, part_weights, published_weights
from rae_jax.diffusion import flow, ode
from rae_jax.diffusion.guidance import Guidance
from rae_jax.runtime import sharding

pytestmark = pytest.mark.skipif(not GOLDENS.is_dir(), reason="../shared/data/goldens is not here")


@pytest.fixture(scope="module")
def dit():
    pytest.importorskip("torch", reason="the goldens' weights are torch files")
    config = config_of(Case(trunk=(32, 3, 2), head=(48, 2, 3), num_classes=10), GOLDENS / "dit_dh_unequal.pt")
    params = part_weights.load(config, "dit", "", sharding.make_mesh(config.mesh))
    return models.dit(config), {"params": params}, config


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDENS / "dit_dh_unequal.npz")


def test_velocity_and_loss_are_the_authors(dit, golden):
    model, params, _ = dit
    x, noise, t = nhwc(golden["x"]), nhwc(golden["noise"]), jnp.asarray(golden["t"])
    x_t = flow.interpolate(x, noise, t)
    assert relative(x_t, nhwc(golden["x_t"])) < 1e-6
    apply = jax.jit(model.apply)
    v = apply(params, x_t, t, golden["y"])
    assert relative(v, nhwc(golden["v"])) < 1e-5
    v_null = apply(params, x_t, t, jnp.full(3, 10))
    assert relative(v_null, nhwc(golden["v_null"])) < 1e-5
    loss = jnp.square(v - flow.velocity(x, noise, t)).mean()
    assert float(loss) == pytest.approx(float(golden["loss"]), rel=1e-5)


def test_gradients_are_the_authors(dit, golden):
    model, params, config = dit
    x, noise, t = nhwc(golden["x"]), nhwc(golden["noise"]), jnp.asarray(golden["t"])

    def loss(params):
        v = model.apply(params, flow.interpolate(x, noise, t), t, golden["y"])
        return jnp.square(v - flow.velocity(x, noise, t)).mean()

    ours = jax.jit(jax.grad(loss))(params)["params"]
    ours = published_weights.tensors_of(config, "dit", ours)
    theirs = {k.removeprefix("grad/"): golden[k] for k in golden.files if k.startswith("grad/")}
    assert not ours["t_embedder.W"].any()  # a constant: the authors have no gradient for it
    for key, b in theirs.items():
        assert jnp.abs(ours[key] - b).max() <= 1e-4 * jnp.abs(b).max(), key


def test_published_trajectory_with_guidance(dit):
    model, params, _ = dit
    golden = np.load(GOLDENS / "euler50_cfg.npz")
    factor = flow.shift_factor((4, 4, 24))
    labels = jnp.asarray(golden["y"])
    strong, weak = (
        flow.undivided(lambda x, t, labels=condition: model.apply(params, x, t, labels))
        for condition in (labels, jnp.full_like(labels, 10))
    )
    velocity_fn = Guidance(1.7, t_min=0.1, t_max=0.9)(strong, weak)
    assert golden["shift"] == pytest.approx(2.449, abs=1e-3)
    # This latent is smaller than 4096 dimensions: its own factor is below one, the golden's is given.
    assert factor == pytest.approx((4 * 4 * 24 / 4096) ** 0.5)
    z = jax.jit(lambda x: ode.euler(velocity_fn, x, jnp.asarray(golden["grid"])))(nhwc(golden["noise"]))
    assert relative(z, nhwc(golden["z"])) < 1e-4


def test_decoder_is_the_authors():
    pytest.importorskip("torch", reason="the goldens' weights are torch files")
    golden = np.load(GOLDENS / "decoder.npz")
    config = config_of(Case())
    config.decoder.update({"width": 32, "depth": 3, "num_heads": 4, "hidden": 64, "patch_size": 8})
    config.decoder.weights = str(GOLDENS / "decoder.pt")
    params = part_weights.load(config, "decoder", "", sharding.make_mesh(config.mesh))
    decoder = models.autoencoder(config).decoder
    image = decoder.apply({"params": params}, jnp.asarray(golden["z"]).reshape(3, 4, 4, 24))
    assert float(jnp.abs(image - nhwc(golden["image"])).max()) < 5e-5
