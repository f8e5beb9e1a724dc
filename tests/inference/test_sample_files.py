"""Samples as files: resumed where they were interrupted, by any devices; never deleted or replaced."""

import concurrent.futures
import json

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

REQUEST = {"config": {"seed": 0, "sampler.num_steps": 2}, "weights": {"dit": "12"}}
NAMES = [str(i) for i in range(10)]


@pytest.fixture(scope="module")
def draw():
    """Draws with random weights, none of them zero: (folder, labels) -> (folder used, {name of a PNG: its bytes})."""
    config = tiny()
    config.sampler.num_steps = 2
    shapes = {part: part_weights.shapes(config, part) for part in ("decoder", "dit")}
    parts = random_like(shapes, seed=0, scale=0.2)
    latent = config_keys.latent_shape(config)
    parts["statistics"] = {"mean": jnp.zeros(latent), "var": jnp.ones(latent)}

    def run(folder, labels, request=REQUEST, devices=8, batch_size=8, fsdp=1):
        labels, config.evaluate.batch_size = np.asarray(labels), batch_size
        config.seed, config.mesh.fsdp = request["config"]["seed"], fsdp
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
        claimed = sample_files.claim(epath.Path(folder), request, labels, config, mesh)
        sample_files.draw(config, parts, labels, mesh, claimed, class_names=NAMES)
        found = {file.name: file.read_bytes() for file in (claimed.folder / "images").glob("*.png")}
        with np.load(claimed.folder / "samples.npz") as written:
            assert written["arr_0"].dtype == np.uint8 and len(written["arr_0"]) == len(labels)
            np.testing.assert_array_equal(written["arr_1"], labels)
            last = claimed.folder / "images" / f"{len(labels) - 1:06d}.png"
            np.testing.assert_array_equal(written["arr_0"][-1], Image.open(last))
        return claimed.folder, found

    return run


def _with(request, **changes):
    return {**request, "config": {**request["config"], **changes}}


@pytest.mark.parametrize(
    "again", [{}, {"batch_size": 24}, {"devices": 6, "batch_size": 12}, {"devices": 1}, {"devices": 4, "fsdp": 2}]
)
def test_an_interrupted_request_is_completed_with_the_same_bytes_on_any_devices(draw, tmp_path, again):
    labels = np.arange(40) % 10
    folder, whole = draw(tmp_path, labels, batch_size=16)
    assert folder == epath.Path(tmp_path) and len(whole) == 40 and len(set(whole.values())) == 40
    kept = tmp_path / "images" / "000003.png"
    stamp = kept.stat().st_mtime_ns
    for i in (2, 9, 12, *range(19, 40)):
        (tmp_path / "images" / f"{i:06d}.png").unlink()
    assert draw(tmp_path, labels, **again) == (folder, whole)
    assert kept.stat().st_mtime_ns == stamp


def test_batch_and_devices_do_not_matter(draw, tmp_path):
    """The images are equal except for their last bits, which depend on the batch of a device."""
    found = []
    for devices, batch_size in ((8, 64), (1, 7)):
        folder, _ = draw(tmp_path / str(devices), np.arange(64) % 10, devices=devices, batch_size=batch_size)
        with np.load(folder / "samples.npz") as written:
            found.append(written["arr_0"].astype(int))
    apart = np.abs(found[0] - found[1])
    assert found[0].std() > 10 and apart.max() <= 1 and (apart > 0).mean() <= 1e-3


def test_another_request_gets_another_folder_and_nothing_is_deleted(draw, tmp_path):
    folder, first = draw(tmp_path, [0] * 16)
    # Fewer and more images of the same request are the same images.
    assert draw(tmp_path, [0] * 8) == (folder, first)
    assert draw(tmp_path, [0] * 16) == (folder, first)
    others = [
        draw(tmp_path, [0] * 15 + [1]),
        draw(tmp_path, [0] * 16, _with(REQUEST, seed=1)),
        draw(tmp_path, [0] * 16, {**REQUEST, "weights": {"dit": "34"}}),
    ]
    folders = {place for place, _ in others}
    assert len(folders) == 3 and all(place.parent == folder for place in folders)
    assert {name for name in first if first[name] != others[0][1][name]} == {"000015.png"}
    assert not set(others[1][1].values()) & set(first.values())
    assert draw(tmp_path, [0] * 16, _with(REQUEST, seed=1)) == others[1]
    assert draw(tmp_path, [0] * 16) == (folder, first)
    (tmp_path / "images" / "request.json").write_text('{"request": ')  # cut off: nobody knows which images these are
    place, again = draw(tmp_path, [0] * 16)
    assert place not in {folder, *folders} and again == first
    assert {file.name for file in (tmp_path / "images").glob("*.png")} == first.keys()


def test_an_older_version_s_request_is_resumed(draw, tmp_path):
    """It named keys on which the images do not depend, and lacked later ones."""
    folder, first = draw(tmp_path, [0] * 8)
    path = tmp_path / "images" / "request.json"
    config = {"sampler.num_steps": 2, "data.num_threads": 2, "data.path": "/gone", "dit.train.batch_size": 16}
    path.write_text(json.dumps({"request": {"config": config, "weights": REQUEST["weights"]}, "labels": [0] * 8}))
    assert draw(tmp_path, [0] * 8) == (folder, first)
    path.write_text(json.dumps({"request": _with(REQUEST, **{"sampler.method": "heun"}), "labels": [0] * 8}))
    assert draw(tmp_path, [0] * 8)[0] != folder


def test_a_request_without_an_image_may_get_another_batch_and_gives_way_to_another_request(tmp_path):
    """As after an end for lack of memory, or a kill before the first image."""
    config, labels = tiny(), np.zeros(64, int)
    mesh = sharding.make_mesh(config.mesh)

    def claim(batch_size, request=REQUEST):
        config.evaluate.batch_size = batch_size
        return sample_files.claim(epath.Path(tmp_path), request, labels, config, mesh)

    assert claim(64).rows == 8 and claim(16) == (epath.Path(tmp_path), 2, frozenset())
    assert claim(16, _with(REQUEST, seed=1)).folder != epath.Path(tmp_path)  # the first command still runs
    path = tmp_path / "images" / "request.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "by": {**saved["by"], "pid": 2**22 + 1}}))
    assert claim(16, _with(REQUEST, seed=2)) == (epath.Path(tmp_path), 2, frozenset())
    assert json.loads(path.read_text())["request"]["config"]["seed"] == 2


def test_two_commands_at_the_same_time_do_not_share_a_folder(tmp_path):
    config, labels = tiny(), np.zeros(4, int)
    mesh, requests = sharding.make_mesh(config.mesh), [_with(REQUEST, seed=seed) for seed in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        claimed = list(pool.map(lambda r: sample_files.claim(epath.Path(tmp_path), r, labels, config, mesh), requests))
    assert len({request.folder for request in claimed}) == 4


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
