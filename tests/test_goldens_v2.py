"""RAEv2's network on random weights is the reference for ours (../shared/data/goldens)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dit_cases import Case, config_of
from golden_cases import GOLDENS, nhwc, relative

from rae_jax.build import models, part_weights, published_weights
from rae_jax.build import sampler as build_sampler
from rae_jax.runtime import sharding

pytestmark = pytest.mark.skipif(not GOLDENS.is_dir(), reason="../shared/data/goldens is not here")


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDENS / "raev2_unequal.npz")


@pytest.fixture(scope="module")
def network():
    """(model, parameters, config)."""
    pytest.importorskip("torch", reason="the goldens' weights are torch files")
    config = config_of(Case(trunk=(32, 4, 2), head=(48, 2, 3), num_classes=10, qk_norm=True))
    config.dit.update({"weights": str(GOLDENS / "raev2_unequal.pt"), "conditioning": "in_context", "base_depth": 2})
    config.dit.prediction = "data_in_velocity"
    params = part_weights.load(config, "dit", "", sharding.make_mesh(config.mesh))
    return models.dit(config), params, config


def test_both_outputs_are_the_authors(network, golden):
    model, params, config = network
    x_t, t = nhwc(golden["x_t"]), jnp.asarray(golden["t"])
    apply = jax.jit(lambda y: model.apply({"params": params}, x_t, t, y, base=True))
    to_velocity = build_sampler.prediction(config).to_velocity
    for suffix, labels in (("", golden["y"]), ("_null", np.full(3, 10))):
        full, base = apply(labels)
        assert relative(full, nhwc(golden[f"full{suffix}"])) < 1e-5
        assert relative(base, nhwc(golden[f"base{suffix}"])) < 1e-5
        if not suffix:
            assert relative(to_velocity(full, x_t, t), nhwc(golden["v_full"])) < 1e-5
            assert relative(to_velocity(base, x_t, t), nhwc(golden["v_base"])) < 1e-5


def _losses(network, golden, params):
    model, _, config = network
    x, x_t, t = nhwc(golden["x"]), nhwc(golden["x_t"]), jnp.asarray(golden["t"])
    p = build_sampler.prediction(config)
    outputs = model.apply({"params": params}, x_t, t, golden["y"], base=True)
    target = p.target(x, nhwc(golden["noise"]), t)
    return [(jnp.square(y - target).mean((1, 2, 3)) * p.weight(t)).mean() for y in outputs]


def test_losses_and_gradients_are_the_authors(network, golden):
    losses = jax.jit(lambda params: _losses(network, golden, params))(network[1])
    np.testing.assert_allclose(losses, [golden["loss_full"], golden["loss_base"]], rtol=1e-5)
    ours = jax.jit(jax.grad(lambda params: sum(_losses(network, golden, params))))(network[1])
    ours = published_weights.tensors_of(network[2], "dit", ours)
    theirs = {k.removeprefix("grad/"): golden[k] for k in golden.files if k.startswith("grad/")}
    assert len(theirs) > 100
    for key, b in theirs.items():
        assert jnp.abs(ours[key] - b).max() <= 1e-4 * jnp.abs(b).max(), key


def test_the_trajectory_with_internal_guidance_is_the_authors(network):
    _, params, config = network
    golden = np.load(GOLDENS / "raev2_euler20_internal.npz")
    config = config.copy_and_resolve_references()
    config.dit.time_shift = float(golden["shift"])
    config.sampler.update({"method": "euler", "grid": "plain", "num_steps": 20})
    config.guidance.update({"method": "internal", "scale": 1.78, "t_min": 0.1, "t_max": 1.0})

    @jax.jit
    def solve(noise):
        velocity = build_sampler.velocity(config, {"dit": params}, jnp.asarray(golden["y"]))
        return build_sampler.sampler(config).solve(velocity, noise, None)

    assert relative(solve(nhwc(golden["noise"])), nhwc(golden["z"])) < 1e-4


def test_the_decoder_s_output_is_the_image_itself():
    """RAEv2's decoder has RAE's names and blocks; only the normalisation of its output differs."""
    pytest.importorskip("torch", reason="the goldens' weights are torch files")
    golden = np.load(GOLDENS / "decoder.npz")
    config = config_of(Case())
    config.decoder.update({"width": 32, "depth": 3, "num_heads": 4, "hidden": 64, "patch_size": 8})
    config.decoder.weights = str(GOLDENS / "decoder.pt")
    params = part_weights.load(config, "decoder", "", sharding.make_mesh(config.mesh))
    latents, expected = jnp.asarray(golden["z"]).reshape(3, 4, 4, 24), nhwc(golden["image"])
    for output, image in (("image", expected), ("normalised", expected * 0.25 + 0.5)):
        config.decoder.output = output
        decoded = jax.jit(models.autoencoder(config).decode)(params, latents)
        assert float(jnp.abs(decoded - image).max()) < 5e-5
