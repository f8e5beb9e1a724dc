"""LPIPS: its definition in torch, its gradient, and its published files.

The goldens (tests/goldens/perception.npz, by make_perception_goldens.py) stand in for torch where it is absent.
"""

import jax
import jax.numpy as jnp
import numpy as np
import perception_cases as cases
import pytest
from conftest import tiny
from etils import epath
from huggingface_hub import constants
from safetensors.numpy import save_file

from rae_jax.build import part_weights, perceptual_networks
from rae_jax.cli import train
from rae_jax.config import checks, run_config
from rae_jax.errors import UserError
from rae_jax.inference import perceptual_metrics
from rae_jax.models.lpips import Lpips
from rae_jax.runtime import sharding

TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 5e-5  # relative; of the gradient, to its largest value


def _load(config):
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    return part_weights.load(config, "lpips", "", mesh)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Files of VGG16 and of the weights of its features."""
    return cases.write(tmp_path_factory.mktemp("lpips"), "vgg", "linear")


@pytest.fixture(scope="module")
def params(paths):
    return _load(cases.config_of(paths))


def _distances(params, a, b, dtype=jnp.float32):
    return np.asarray(jax.jit(Lpips(dtype).apply)({"params": params}, a, b))


@jax.jit
def _with_gradient(params, a, b):
    """Distances as the metrics have them, and the gradient of their sum by the first images."""

    def distances(a):
        found = perceptual_metrics.compare({"lpips": params}, a, b)["lpips"]
        return found.sum(), found

    (_, found), gradient = jax.value_and_grad(distances, has_aux=True)(a)
    return found, gradient


def test_distances_and_gradient_are_the_goldens(params):
    found, gradient = _with_gradient(params, *cases.pair())
    golden = cases.goldens()["lpips_gradient"]
    np.testing.assert_allclose(found, cases.goldens()["lpips"], rtol=TOLERANCE)
    assert np.abs(gradient - golden).max() <= GRADIENT_TOLERANCE * np.abs(golden).max()
    assert found.shape == (2,) and found.dtype == np.float32


def test_distances_are_the_definition_with_the_released_weights(paths):
    """VGG16 made up, the 1x1 weights as they were released, in a torch file; also at an odd size."""
    torch = pytest.importorskip("torch")
    if not cases.LINEAR.is_file():
        pytest.skip("../shared/data/reference is not here")
    params = _load(cases.config_of({**paths, "linear": str(cases.LINEAR)}))
    vgg = {k: torch.from_numpy(v) for k, v in cases.arrays_of("vgg").items()}
    linear = torch.load(cases.LINEAR, map_location="cpu", weights_only=True)

    a, b = cases.pair()
    theirs = torch.from_numpy(a).requires_grad_()
    expected = cases.torch_lpips(vgg, linear, theirs, torch.from_numpy(b))
    expected.sum().backward()
    found, gradient = _with_gradient(params, a, b)
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=TOLERANCE)
    assert np.abs(gradient - theirs.grad.numpy()).max() <= GRADIENT_TOLERANCE * float(theirs.grad.abs().max())

    a, b = np.random.default_rng(0).random((2, 1, 37, 50, 3), np.float32)
    expected = cases.torch_lpips(vgg, linear, torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(_distances(params, a, b), expected.numpy(), rtol=TOLERANCE)


def test_bfloat16_stays_close(params):
    found = _distances(params, *cases.pair(), jnp.bfloat16)
    apart = np.abs(found / cases.goldens()["lpips"] - 1)
    assert found.dtype == np.float32
    assert (apart > 1e-6).all() and (apart < 0.02).all()


def test_dead_features_have_no_gradient_instead_of_nan(params):
    """If no ReLU is active, the length of the features is 0, whose square root has no derivative."""
    dead = jax.tree.map(lambda x: -jnp.abs(x), params["vgg"])
    found, gradient = _with_gradient({"vgg": dead, "linear": params["linear"]}, *cases.pair())
    assert (np.asarray(found) == 0).all() and (np.asarray(gradient) == 0).all()


def test_wrong_files_are_refused(paths, tmp_path):
    damages = {
        "vgg": [
            ("lacks tensor 'features.28.bias'", lambda a: a.pop("features.28.bias")),
            ("unknown tensor 'features.30.weight'", lambda a: a.update({"features.30.weight": np.zeros(3)})),
            ("'features.0.bias' has shape", lambda a: a.update({"features.0.bias": np.zeros(3)})),
        ],
        "linear": [
            ("lacks tensor 'lin4.model.1.weight'", lambda a: a.pop("lin4.model.1.weight")),
            ("has shape", lambda a: a.update({"lin0.model.1.weight": np.zeros((1, 192, 1, 1))})),  # AlexNet's
            ("unknown tensor 'lin5.model.1.weight'", lambda a: a.update({"lin5.model.1.weight": np.zeros(3)})),
        ],
    }
    for name, kinds in damages.items():
        for message, damage in kinds:
            arrays = cases.arrays_of(name)
            damage(arrays)
            save_file(arrays, tmp_path / "file.safetensors")
            with pytest.raises(UserError, match=message) as refusal:
                _load(cases.config_of({**paths, name: str(tmp_path / "file.safetensors")}))
            assert "\n" not in str(refusal.value)


def test_without_files_it_is_off_and_half_of_it_is_a_mistake(paths, tiny_config):
    assert perceptual_networks.named(tiny_config) == () and _load(tiny_config) is None
    mesh = sharding.make_mesh(tiny_config.mesh)
    for key in ("vgg", "linear"):
        with pytest.raises(UserError, match="config.lpips.linear=.* or neither"):
            checks.check(cases.config_of({key: paths[key]}), mesh)
    checks.check(cases.config_of(paths), mesh)


@pytest.mark.parametrize("key", ["lpips.vgg", "lpips.linear", "evaluate.inception"])
def test_without_network_the_file_and_the_key_are_named(paths, tmp_path, monkeypatch, key):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    config = cases.config_of(paths)
    config.update_from_flattened_dict({key: "some/place:weights.pth"})
    part = "inception" if key == "evaluate.inception" else "lpips"
    for attempt in (
        perceptual_networks.check_available,
        lambda config: part_weights.load(config, part, "", sharding.make_mesh(config.mesh)),
    ):
        with pytest.raises(UserError) as refusal:
            attempt(config)
        text = str(refusal.value)
        assert f"config.{key}: " in text and f"--config.{key}=''" in text and "\n" not in text
        assert "download weights.pth of some/place, put it in a local folder, and name that file" in text


def test_training_finds_out_before_anything_is_written(paths, tmp_path):
    config = cases.config_of({**paths, "linear": str(tmp_path / "not_there.pth")})
    with pytest.raises(UserError, match="config.lpips.linear: the file .*not_there.pth does not exist"):
        train.run(config, epath.Path(tmp_path / "run"), sharding.make_mesh(config.mesh), None)
    assert not (tmp_path / "run").exists()


def test_a_run_whose_loss_has_no_lpips_may_change_it(paths, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    before, after = tiny(), cases.config_of(paths)
    for config in (before, after):
        config.stages = ("dit",)
    run_config.save(before, tmp_path)
    run_config.check(after, tmp_path, *after.stages)
    for config in (before, after):
        config.stages = ("decoder",)
    run_config.save(before, tmp_path)
    with pytest.raises(UserError, match="config.lpips.linear='', not "):
        run_config.check(after, tmp_path, *after.stages)
