"""Evaluation on held-out images without labels: the same numbers, without those that need labels."""

import jax
import numpy as np
import pytest
from conftest import one_device, random_like, tiny
from PIL import Image

from rae_jax.build import part_weights
from rae_jax.config import keys as config_keys
from rae_jax.inference.evaluator import Evaluator


@pytest.fixture(scope="module")
def parts():
    config = tiny()
    shapes = {part: part_weights.shapes(config, part) for part in ("encoder", "judge", "decoder", "dit")}
    latent = config_keys.latent_shape(config)
    statistics = {"mean": np.zeros(latent, np.float32), "var": np.ones(latent, np.float32)}
    return jax.device_put({**random_like(shapes, seed=0, scale=0.2), "statistics": statistics})


def _images(folder, flat):
    """Write 24 images of ten classes; return the folder."""
    rng = np.random.default_rng(0)
    for n in range(24):
        place = folder if flat else folder / f"class{n % 10}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(place / f"{n % 10}_{n:02d}.png")
    return str(folder)


def test_without_labels_the_other_numbers_stay(tmp_path, parts, capfd):
    config = tiny()
    config.data.update({"source": "image_folder", "path": _images(tmp_path / "train", flat=False)})
    config.evaluate.update({"probe": True, "num_images": 10})
    found = {}
    for flat in (False, True):
        config.data.heldout_path = _images(tmp_path / f"heldout{flat}", flat=flat)
        found[flat], pictures = Evaluator(config, one_device()).weights(parts, probe=True)
        assert set(pictures) == {"reconstructions", "samples"} and pictures["reconstructions"].std() > 0
    said = [line for line in capfd.readouterr().err.splitlines() if "have no labels" in line]
    assert len(said) == 1 and "the held-out images have no labels: judge_accuracy" in said[0]
    needed = {"judge_accuracy", "probe", "probe_random", "probe_pixels"}
    assert needed <= found[False].keys() and found[False].keys() - found[True].keys() == needed
    for name, value in found[True].items():  # agreement is of generated images, whose labels are known
        np.testing.assert_allclose(value, found[False][name], rtol=1e-5, err_msg=name)
