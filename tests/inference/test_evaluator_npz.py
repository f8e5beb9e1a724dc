"""Samples and references of an evaluation that cannot be used: one line names the file and its fault."""

import zipfile

import numpy as np
import perceptual_stand_ins
import pytest
from conftest import tiny

from rae_jax.errors import UserError
from rae_jax.inference.evaluator import Evaluator
from rae_jax.runtime import sharding


@pytest.fixture(autouse=True)
def small_networks():
    with perceptual_stand_ins.in_place():
        yield


def _evaluator(**evaluate):
    config = tiny()
    config.evaluate.update({"inception": "its weights are not read here", **evaluate})
    return Evaluator(config, sharding.make_mesh(config.mesh))


def _npz(folder, **arrays):
    np.savez(folder / "given.npz", **arrays)
    return str(folder / "given.npz")


def _cut_off(path, **arrays):
    np.savez(path, **arrays)
    path.write_bytes(path.read_bytes()[:-40])


IMAGES = np.zeros((4, 32, 32, 3), np.uint8)
MU, SIGMA = np.zeros(12), np.eye(12)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"images": IMAGES}, "it lacks arr_0"),
        ({"arr_0": IMAGES / 255}, r"arr_0 is float64 \(4, 32, 32, 3\), not images: it must be uint8 \[N, H, W, 3\]"),
        ({"arr_0": IMAGES[..., 0]}, r"arr_0 is uint8 \(4, 32, 32\), not images"),
        ({"arr_0": IMAGES[:0]}, r"arr_0 is uint8 \(0, 32, 32, 3\), not images"),
        ({"arr_0": IMAGES[:1]}, "it holds a single image"),
        ({"arr_0": np.array([None, 1])}, "not a whole npz file"),
        (
            {"arr_0": IMAGES, "arr_1": np.arange(3)},
            r"arr_1 is int64 \(3,\), not 4 integers: it must hold one label for each image",
        ),
    ],
)
def test_samples_that_are_wrong_are_named(tmp_path, arrays, message):
    path = _npz(tmp_path, **arrays)
    with pytest.raises(UserError, match=f"--samples={path}: .*{message}") as refusal:
        _evaluator().images({}, path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"images": IMAGES}, r"neither images \(arr_0\) nor moments \(mu and sigma\)"),
        ({"mu": MU}, "it holds mu without sigma"),
        ({"arr_0": IMAGES, "sigma_s": SIGMA}, "it holds sigma_s without mu_s"),
        ({"mu": MU[:-1], "sigma": SIGMA}, r"mu has shape \(11,\), not \(12,\)"),
        ({"mu": MU, "sigma": SIGMA[:-1]}, r"sigma has shape \(11, 12\), not \(12, 12\)"),
        ({"mu": MU, "sigma": np.nan * SIGMA}, "sigma holds values that are not finite"),
    ],
)
def test_references_that_are_wrong_are_named(tmp_path, arrays, message):
    path = _npz(tmp_path, **arrays)
    with pytest.raises(UserError, match=f"config.evaluate.reference={path}: .*{message}") as refusal:
        _evaluator(reference=path)
    assert "\n" not in str(refusal.value)


def test_files_that_are_none_are_named(tmp_path):
    _cut_off(tmp_path / "cut.npz", arr_0=IMAGES)
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("arr_0.npy", "something else")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("cut.npz", "not a whole npz file"),
        ("other.npz", "not a whole npz file"),
        ("nowhere.npz", "it does not exist: name an .npz file or a folder of images"),
        ("empty", "holds no image"),
    ):
        with pytest.raises(UserError, match=f"--samples={tmp_path / name}: .*{message}") as refusal:
            _evaluator().images({}, str(tmp_path / name))
        assert "\n" not in str(refusal.value)
    moments = _npz(tmp_path, mu=MU, sigma=SIGMA)
    with pytest.raises(UserError, match="its moments need config.evaluate.inception"):
        _evaluator(reference=moments, inception="")
