"""Samples as files: taken up where they were interrupted, replaced where something else is wanted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_like, tiny
from etils import epath
from PIL import Image

from rae_jax.build import part_weights
from rae_jax.config import keys as config_keys
from rae_jax.errors import UserError
from rae_jax.inference import sample_files
from rae_jax.runtime import sharding

REQUEST = {"steps": {"dit": 6}}
NAMES = [str(i) for i in range(10)]


@pytest.fixture(scope="module")
def draw():
    """Draws with random weights, none of them zero: (folder, labels) -> {name of a PNG: its bytes}."""
    config = tiny()
    config.sampler.num_steps = 2
    shapes = {part: part_weights.shapes(config, part) for part in ("decoder", "dit")}
    parts = random_like(shapes, seed=0, scale=0.2)
    latent = config_keys.latent_shape(config)
    parts["statistics"] = {"mean": jnp.zeros(latent), "var": jnp.ones(latent)}

    def run(folder, labels, request=REQUEST, devices=8, batch_size=8, seed=0):
        labels, config.evaluate.batch_size, config.seed = np.asarray(labels), batch_size, seed
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
        sample_files.draw(config, parts, labels, mesh, folder, request=request, class_names=NAMES)
        found = {file.name: file.read_bytes() for file in (folder / "images").glob("*.png")}
        with np.load(folder / "samples.npz") as written:
            assert written["arr_0"].dtype == np.uint8 and len(written["arr_0"]) == len(labels)
            np.testing.assert_array_equal(written["arr_1"], labels)
            last = folder / "images" / f"{len(labels) - 1:06d}.png"
            np.testing.assert_array_equal(written["arr_0"][-1], Image.open(last))
        return found

    return run


def test_what_an_interruption_left_is_completed_with_the_same_bytes(draw, tmp_path):
    folder = epath.Path(tmp_path)
    whole = draw(folder, np.arange(20) % 10)
    assert len(whole) == 20 and len(set(whole.values())) == 20
    kept = folder / "images" / "000003.png"
    stamp = kept.stat().mtime
    for i in (9, 12, 19):
        (folder / "images" / f"{i:06d}.png").unlink()
    assert draw(folder, np.arange(20) % 10) == whole
    assert kept.stat().mtime == stamp  # its batch was whole: not drawn again


def test_batch_and_devices_do_not_matter(draw, tmp_path):
    """But for the rounding of a level in few values: labels, noise and order are the same."""
    found = []
    for devices, batch_size in ((8, 64), (1, 7)):
        folder = epath.Path(tmp_path) / str(devices)
        draw(folder, np.arange(64) % 10, devices=devices, batch_size=batch_size)
        with np.load(folder / "samples.npz") as written:
            found.append(written["arr_0"].astype(int))
    apart = np.abs(found[0] - found[1])
    assert found[0].std() > 10 and apart.max() <= 1 and (apart > 0).mean() <= 1e-3


def test_other_labels_and_other_requests_replace_what_they_must(draw, tmp_path):
    folder = epath.Path(tmp_path)
    first = draw(folder, [0] * 16)
    changed = draw(folder, [0] * 15 + [1])
    assert {name for name in first if first[name] != changed[name]} == {"000015.png"}
    # Fewer are asked for: the others stay, and still count later.
    assert draw(folder, [0] * 8) == changed
    assert draw(folder, [0] * 15 + [1]) == changed
    (folder / "images" / "mine.png").write_bytes(first["000000.png"])
    (folder / "images" / "request.json").write_text('{"request": ')  # cut off
    (folder / "images" / "000000.png").write_bytes(b"")
    again = draw(folder, [0] * 16)
    assert again.pop("mine.png") and again == first
    others = draw(folder, [0] * 16, request={**REQUEST, "seed": 1}, seed=1)
    assert others.pop("mine.png") and not set(others.values()) & set(first.values())


def test_labels(tmp_path):
    np.testing.assert_array_equal(sample_files.labels_of("balanced", 4, 3, 0), [0, 1, 2, 0])
    many = sample_files.labels_of("random", 500, 10, 7)
    np.testing.assert_array_equal(many[:50], sample_files.labels_of("random", 50, 10, 7))
    assert set(many) == set(range(10))
    file = tmp_path / "labels.txt"
    file.write_text("2\n0\n1\n")
    np.testing.assert_array_equal(sample_files.labels_of(str(file), 2, 3, 0), [2, 0])
    for text, count, message in (
        ("2\n0\n", 3, "holds 2 labels"),
        ("3\n", 1, "labels are 0 to 2"),
        ("a\n", 1, "one lab"),
        ("0 1\n1 0\n", 2, "2 numbers a line"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            sample_files.labels_of(str(file), count, 3, 0)
    with pytest.raises(UserError, match="balanced, random, or a file"):
        sample_files.labels_of(str(tmp_path / "nowhere"), 1, 3, 0)


def test_random_labels_are_of_the_seed_and_balanced_ones_are_as_many_of_each_class():
    """The numbers of 3,000 draws in ten classes have a chi-square of nine degrees of freedom."""
    random = {seed: sample_files.labels_of("random", 3000, 10, seed) for seed in (0, 1)}
    for labels in random.values():
        chi_square = np.square(np.bincount(labels, minlength=10) - 300).sum() / 300
        assert 1.15 < chi_square < 27.9  # outside on either side: a probability of 0.001
    assert abs((random[0] == random[1]).mean() - 0.1) < 0.02  # 3.6 standard deviations
    assert (np.bincount(sample_files.labels_of("balanced", 3000, 10, 0)) == 300).all()
