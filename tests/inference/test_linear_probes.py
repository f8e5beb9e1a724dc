"""Linear probes: what they are fitted to, and the training images that they read themselves."""

import jax
import numpy as np
import pytest
from conftest import one_device, random_like
from PIL import Image

from rae_jax.build import data as build_data
from rae_jax.build import models, part_weights
from rae_jax.errors import UserError
from rae_jax.inference import linear_probes, metrics
from rae_jax.runtime import sharding


def test_each_probe_has_the_features_and_labels_of_its_own_encoder(tiny_config, monkeypatch):
    """Twelve of twenty training images, in any order, and twelve held-out ones; the order is read from the pixels."""
    given = {}

    def linear_probe(*arrays, num_classes):
        given[name := ("probe", "probe_random", "probe_pixels")[len(given)]] = arrays
        assert num_classes == 10
        return name

    monkeypatch.setattr(metrics, "linear_probe", linear_probe)
    monkeypatch.setattr(linear_probes, "TRAIN_IMAGES", 12)
    tiny_config.data.update({"num_train": 20, "num_heldout": 12})
    parts = {"encoder": random_like(part_weights.shapes(tiny_config, "encoder"), seed=0, scale=0.1)}
    sources = [build_data.source(tiny_config, split) for split in ("train", "heldout")]
    examples = [[source[i] for i in range(len(source))] for source in sources]
    images, labels = ([np.stack([one[key] for one in of]) for of in examples] for key in ("image", "label"))
    found = linear_probes.probes(tiny_config, parts, images[1], labels[1], one_device())
    assert found == {name: name for name in ("probe", "probe_random", "probe_pixels")}

    pixels = [np.float32(of).reshape(len(of), -1) / 255 for of in images]
    chosen, _, others, _ = given["probe_pixels"]
    order = np.abs(chosen[:, None] - pixels[0]).max(-1).argmin(1)
    assert len(set(order)) == 12
    np.testing.assert_allclose(chosen, pixels[0][order], atol=1e-6)
    np.testing.assert_allclose(others, pixels[1], atol=1e-6)
    for _, train_labels, _, test_labels in given.values():
        np.testing.assert_array_equal(train_labels, labels[0][order])
        np.testing.assert_array_equal(test_labels, labels[1])

    encode = jax.jit(models.autoencoder(tiny_config).encode)
    for seen, of in ((0, images[0][order]), (2, images[1])):
        pooled = np.asarray(encode(parts["encoder"], np.float32(of) / 255)).mean((1, 2))
        np.testing.assert_allclose(given["probe"][seen], pooled, atol=1e-4)
        assert np.abs(given["probe_random"][seen] - pooled).max() > 0.1


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
    parts = {"encoder": random_like(part_weights.shapes(tiny_config, "encoder"), seed=0, scale=0.1)}
    labels, mesh = np.arange(4) % 2, sharding.make_mesh(tiny_config.mesh)
    images = np.broadcast_to((150 * labels).astype(np.uint8)[:, None, None, None], (4, 32, 32, 3))
    tiny_config.data.on_error = on_error
    if on_error == "stop":
        with pytest.raises(UserError, match="light/3.png"):
            linear_probes.probes(tiny_config, parts, images, labels, mesh)
        return
    found = linear_probes.probes(tiny_config, parts, images, labels, mesh)
    assert set(found) == {"probe", "probe_random", "probe_pixels"} and found["probe_pixels"] == 1.0
    assert "light/3.png" in capfd.readouterr().err
