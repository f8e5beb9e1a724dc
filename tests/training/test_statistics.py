"""Latent statistics of real images through the real loop, against float64 on the same latents."""

import types
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import tiny
from etils import epath

from rae_jax.build import data as build_data
from rae_jax.build import models, part_weights, stages
from rae_jax.config import checks
from rae_jax.errors import UserError
from rae_jax.runtime import checkpoint_reader, sharding
from rae_jax.training import statistics
from rae_jax.training.loop import fit

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "cifar10" / "test.zip"
RUNS = [(7, 1), (64, 1), (256, 1), (8, 8), (64, 8), (256, 8)]  # batch size, devices


def _config(folder, num_images, batch_size):
    config = tiny()
    config.encoder.update({"width": 64, "depth": 6})  # the shipped one, whose latents mean something
    config.stages = ("statistics",)
    config.data.update({"source": "image_folder", "path": str(folder), "heldout_path": str(folder)})
    config.data.num_classes = 1
    config.discriminator.layers = (0,)
    config.statistics.batch_size = batch_size
    if not (folder / "all").exists():
        if not PHOTOGRAPHS.exists():
            pytest.skip(f"no photographs at {PHOTOGRAPHS}")
        (folder / "all").mkdir()
        with zipfile.ZipFile(PHOTOGRAPHS) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
            for i, name in enumerate(names[:: len(names) // num_images][:num_images]):
                (folder / "all" / f"{i:05d}.jpg").write_bytes(archive.read(name))
    return config


def _run(config, workdir, devices):
    """The final state of the stage."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    checks.check(config, mesh)
    stage = stages.stage(config, "statistics", workdir, mesh)
    options = {"log_every": 1000, "checkpoint_every": 1000, "keep": 1}
    fit(stage, workdir=workdir, mesh=mesh, key=jax.random.key(0), **options)
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    placed = sharding.shardings(shapes, mesh)
    abstract = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed)
    return checkpoint_reader.restore_entries(workdir / "checkpoints" / "statistics", stage.num_steps, abstract)


def _exact(config):
    """Mean and variance of the latents in float64."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    encode, params = jax.jit(models.autoencoder(config).encode), part_weights.load(config, "encoder", "", mesh)
    source = build_data.source(config, "train")
    latents = []
    for some in np.array_split(np.arange(len(source)), -(-len(source) // 50)):
        images = np.stack([source[i]["image"] for i in some]) / np.float32(255)
        latents.append(np.asarray(encode(params, images), np.float64))
    latents = np.concatenate(latents)
    return latents.mean(0), latents.var(0)


def _compare(tmp_path, num_images, runs):
    folder = tmp_path / "photographs"
    folder.mkdir()
    mean, var = _exact(_config(folder, num_images, 8))
    for batch_size, devices in runs:
        config = _config(folder, num_images, batch_size)
        state = _run(config, epath.Path(tmp_path) / f"{batch_size}_{devices}", devices)
        found = statistics.statistics(state)
        assert int(state["count"]) == num_images
        errors = [float(np.abs(found[k] - v).max()) for k, v in (("mean", mean), ("var", var))]
        print(f"{num_images} images, batch {batch_size}, {devices} devices: mean {errors[0]:.1e}, var {errors[1]:.1e}")
        assert max(errors) <= 1e-6


def test_statistics_are_exact_whatever_the_batch_and_the_devices(tmp_path):
    _compare(tmp_path, 100, [(7, 1), (64, 8)])


@pytest.mark.slow
@pytest.mark.by_hand
def test_statistics_of_2000_images_are_exact(tmp_path):
    _compare(tmp_path, 2000, RUNS)


def test_a_batch_that_the_devices_cannot_share_is_refused(tmp_path):
    config = tiny()
    config.statistics.batch_size = 7
    with pytest.raises(UserError, match="config.statistics.batch_size=7 cannot be split over 8 devices"):
        checks.check(config, sharding.make_mesh(config.mesh))


def test_thousands_of_small_batches_lose_no_digits():
    """A large mean with a small deviation: plain float32 sums had relative errors of 4e-6 and 9e-6."""

    class Pixels:
        def encode(self, params, images):
            return images * 255.0 + 100.0

    init, step = statistics.make(autoencoder=Pixels(), latent_shape=(1, 1, 3))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 3, (3000, 4, 1, 1, 3)).astype(np.uint8)
    mask = (np.arange(4) < rng.integers(1, 5, (3000, 1))).astype(np.float32)
    batches = {"image": pixels, "mask": mask}
    state = jax.jit(lambda b: jax.lax.scan(lambda s, b: (step(s, {"encoder": None}, b, None)[0], 0), init(None), b))(
        batches
    )[0]
    found = statistics.statistics(state)
    seen = pixels[mask > 0].astype(np.float64) + 100.0
    assert int(state["count"]) == len(seen)
    np.testing.assert_allclose(found["mean"], seen.mean(0), rtol=1e-7)
    np.testing.assert_allclose(found["var"], seen.var(0), rtol=1e-6)


def test_a_batch_of_which_nothing_can_be_read_changes_nothing():
    """Also where it is the first one."""
    encoder = types.SimpleNamespace(encode=lambda params, images: images)
    init, step = statistics.make(autoencoder=encoder, latent_shape=(2, 2, 3))
    rng, state = np.random.default_rng(0), init(None)
    for images, mask in ((np.zeros((4, 2, 2, 3), np.uint8), 0), (rng.integers(0, 256, (4, 2, 2, 3), np.uint8), 1)):
        batch = {"image": images, "mask": np.full(4, mask, np.float32)}
        state, metrics = step(state, {"encoder": None}, batch, None)
        assert all(np.isfinite(value) for value in metrics.values())
    np.testing.assert_allclose(statistics.statistics(state)["mean"], (images / 255).mean(0), atol=1e-6)
    np.testing.assert_allclose(statistics.statistics(state)["var"], (images / 255).var(0), atol=1e-6)
