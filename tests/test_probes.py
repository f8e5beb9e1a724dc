"""Linear probes: the training images that they read themselves."""

import numpy as np
import pytest
from conftest import random_like
from PIL import Image

from rae_jax import probes, sharding, stages
from rae_jax.errors import UserError


@pytest.mark.parametrize("on_error", ["stop", pytest.param("skip", marks=pytest.mark.slow)])
def test_an_image_that_cannot_be_read_stops_or_is_left_out(tiny_config, tmp_path, capfd, on_error):
    rng = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        (tmp_path / name).mkdir()
        for i in range(6):
            pixels = rng.integers(100 * label, 100 * label + 100, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    (tmp_path / "light" / "3.png").write_bytes(b"no image")
    changes = {"source": "image_folder", "path": str(tmp_path), "heldout_path": str(tmp_path), "num_classes": 2}
    tiny_config.data.update(changes)
    parts = {"encoder": random_like(stages.part_shapes(tiny_config, "encoder"), seed=0, scale=0.1)}
    labels, mesh = np.arange(4) % 2, sharding.make_mesh(tiny_config.mesh)
    images = np.broadcast_to((150 * labels).astype(np.uint8)[:, None, None, None], (4, 32, 32, 3))
    tiny_config.data.on_error = on_error
    if on_error == "stop":
        with pytest.raises(UserError, match="light/3.png"):
            probes.probes(tiny_config, parts, images, labels, mesh)
        return
    found = probes.probes(tiny_config, parts, images, labels, mesh)
    assert set(found) == {"probe", "probe_random", "probe_pixels"} and found["probe_pixels"] == 1.0
    assert "light/3.png" in capfd.readouterr().err
