"""--mode=reconstruct, and the same metrics in evaluate: whatever the batch, the devices and the way in."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import perception_cases as cases
import pytest
from conftest import random_like
from etils import epath
from PIL import Image

from configs import small
from rae_jax.build import data as build_data
from rae_jax.build import models, part_weights, perceptual_networks
from rae_jax.cli import reconstruct as cli_reconstruct
from rae_jax.errors import UserError
from rae_jax.inference import evaluator, image_grid, metrics, perceptual_metrics, reconstruct
from rae_jax.inference.collector import Collector
from rae_jax.models.lpips import Lpips
from rae_jax.runtime import sharding

METRICS = ("psnr", "ssim", "lpips", "rfid")


def _shipped(**paths):
    """The shipped weights on ten held-out shapes, one of each class."""
    config = cases.config_of(paths, small.get_config())
    config.stages = ()
    config.data.num_heldout = 10
    config.evaluate.update({"num_images": 5, "probe": False})
    return config


def _reconstruct(config, images, workdir):
    mesh = sharding.make_mesh(config.mesh)
    cli_reconstruct.run(config, epath.Path(workdir), mesh, types.SimpleNamespace(images=str(images)))
    return json.loads((workdir / "eval" / "reconstruct.json").read_text())


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return cases.write(tmp_path_factory.mktemp("weights"), "vgg", "linear", "inception")


@pytest.fixture
def folder(tmp_path):
    """The held-out shapes as files in class folders."""
    source = build_data.source(_shipped(), "heldout")
    for i in range(len(source)):
        kind = source.class_names[source[i]["label"]]
        image_grid.save(tmp_path / "images" / kind / "1.png", source[i]["image"])
    return tmp_path / "images"


@pytest.mark.slow
def test_files_and_the_held_out_images_have_the_same_metrics(paths, folder, tmp_path, capsys):
    """Eight devices and a batch of 16, ten of them real, against one device and batches of 4."""
    config = _shipped(**paths)
    found = _reconstruct(config, folder, tmp_path)
    assert found.keys() == {*METRICS, "num_images"} and found["num_images"] == 10
    assert "rfid: the covariance of 2048 features from 10 images" in capsys.readouterr().err

    config.evaluate.batch_size, config.sampler.num_steps = 4, 1
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    names = ("encoder", "decoder", "statistics", "dit", *perceptual_networks.named(config))
    parts = {name: part_weights.load(config, name, "", mesh) for name in names}
    results, _ = evaluator.Evaluator(config, mesh).weights(parts)
    for name in METRICS:
        assert results[name] == pytest.approx(found[name], rel=1e-4), name

    # The pairs are there, and the metrics are theirs.
    written = tmp_path / "samples" / "reconstructed"
    files = sorted(folder.glob("*/*"))
    shown = {
        kind: np.stack([np.asarray(Image.open(written / kind / f"{f.relative_to(folder)}.png")) for f in files])
        for kind in ("given", "decoded")
    }
    np.testing.assert_array_equal(shown["given"], np.stack([np.asarray(Image.open(file)) for file in files]))
    given, decoded = (shown[kind] / np.float32(255) for kind in ("given", "decoded"))
    parts = {"lpips": part_weights.load(config, "lpips", "", mesh)}
    assert found["psnr"] == pytest.approx(float(metrics.psnr(decoded, given).mean()), rel=1e-5)
    assert found["ssim"] == pytest.approx(float(metrics.ssim(decoded, given).mean()), rel=1e-5)
    lpips = jax.jit(Lpips().apply)({"params": parts["lpips"]}, decoded, given)
    assert found["lpips"] == pytest.approx(float(lpips.mean()), rel=1e-5)
    assert Image.open(tmp_path / "samples" / "reconstructed.png").width > 10 * 32 * 3


def test_metrics_are_those_of_the_rounded_images(tiny_config, monkeypatch):
    """Pixels are rounded to the nearest of 256 levels, and all networks and metrics see the rounded ones.

    Means of squares of 8x8 pixels stand in for Inception's features, a mean of squared differences for LPIPS.
    """

    def features(params, images):
        return dict.fromkeys(("pool", "spatial"), images.reshape(-1, 4, 8, 4, 8, 3).mean((2, 4)).reshape(-1, 48))

    lpips = types.SimpleNamespace(apply=lambda _, a, b: jnp.square(a - b).mean((1, 2, 3)))
    monkeypatch.setattr(perceptual_metrics, "features", features)
    monkeypatch.setattr(perceptual_metrics, "Lpips", lambda: lpips)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    parts = {part: part_weights.shapes(tiny_config, part) for part in ("encoder", "decoder")}
    parts = random_like(parts, seed=0, scale=0.4)
    autoencoder, redraw = models.autoencoder(tiny_config), reconstruct.make(tiny_config)

    @jax.jit
    def redrawn(parts, pixels):
        latents = autoencoder.encode(parts["encoder"], pixels.astype(jnp.float32) / 255)
        _, found = redraw({**parts, "inception": {}, "lpips": {}}, pixels)
        return found, autoencoder.decode(parts["decoder"], latents)

    found, decoded = jax.tree.map(np.asarray, redrawn(parts, pixels))
    assert 0.2 < ((decoded > 0) & (decoded < 1)).mean() < 1
    apart = found["decoded"] != np.rint(255 * np.clip(np.float64(decoded), 0, 1))
    assert apart.mean() < 1e-3  # in the middle between two levels

    given, decoded = (np.float64(images) / 255 for images in (pixels, found["decoded"]))
    error = np.square(given - decoded).mean((1, 2, 3))
    np.testing.assert_allclose(found["psnr"], -10 * np.log10(error), rtol=1e-6)
    np.testing.assert_allclose(found["lpips"], error, rtol=1e-5)
    np.testing.assert_allclose(found["ssim"], metrics.ssim(np.float32(decoded), np.float32(given)), rtol=1e-5)
    np.testing.assert_allclose(found["pool"], features(None, given)["pool"], rtol=1e-5)
    np.testing.assert_allclose(found["decoded_pool"], features(None, decoded)["pool"], rtol=1e-5)

    # rFID of all batches. Of fewer images than features the root's trace is a sum of singular values.
    moments = Collector(moments=reconstruct.MOMENTS)
    for rows in (slice(0, 4), slice(4, 6)):
        moments.add(jax.tree.map(lambda x, rows=rows: x[rows], found))
    a, b = (features(None, images)["pool"] for images in (given, decoded))
    cross = np.linalg.svd((a - a.mean(0)) @ (b - b.mean(0)).T, compute_uv=False).sum() / 5
    expected = np.square(a.mean(0) - b.mean(0)).sum() + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum() - 2 * cross
    assert reconstruct.rfid(moments)["rfid"] == pytest.approx(expected, rel=1e-4)


def test_one_file_without_networks(folder, tmp_path):
    found = _reconstruct(_shipped(), folder / "star" / "1.png", tmp_path)
    assert found.keys() == {"psnr", "ssim", "num_images"} and found["num_images"] == 1 and found["psnr"] > 20
    assert (tmp_path / "samples" / "reconstructed" / "decoded" / "1.png.png").exists()


def test_a_broken_file_and_an_empty_folder_are_named(folder, tmp_path):
    """And where the broken file is left out, the metrics are means over all the others, of two batches."""
    (folder / "star" / "2.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(UserError, match="cannot read the image .*star/2.png .*: repair it, or leave it out"):
        _reconstruct(_shipped(), folder, tmp_path)
    config = _shipped()
    config.data.on_error, config.evaluate.batch_size = "skip", 8
    found = _reconstruct(config, folder, tmp_path)
    names = [f"{file.relative_to(folder)}.png" for file in folder.glob("*/1.png")]
    written = tmp_path / "samples" / "reconstructed"
    pairs = [[np.asarray(Image.open(written / kind / name)) / 255 for kind in ("given", "decoded")] for name in names]
    expected = np.mean([-10 * np.log10(np.square(one - other).mean()) for one, other in pairs])
    assert found["num_images"] == len(pairs) == 10 and found["psnr"] == pytest.approx(expected, rel=1e-5)
    (tmp_path / "nothing").mkdir()
    for name in ("nothing", "nowhere"):
        with pytest.raises(UserError, match=f"{name} holds no image: name a .*.png"):
            _reconstruct(_shipped(), tmp_path / name, tmp_path)
