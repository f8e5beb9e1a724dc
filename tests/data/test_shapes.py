"""Sources and pipelines."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rae_jax.data import pipeline
from rae_jax.data.decode import centre_crop, random_crop
from rae_jax.data.shapes import CLASS_NAMES, Shapes
from rae_jax.data.sources import image_folder
from rae_jax.errors import UserError
from rae_jax.inference import metrics


def _shapes(split="train", num_images=100, seed=0):
    return Shapes(split=split, num_images=num_images, image_size=32, seed=seed)


def test_a_shape_depends_on_seed_split_and_index_alone():
    small, large = _shapes(), _shapes(num_images=1000)
    np.testing.assert_array_equal(small[7]["image"], large[7]["image"])
    assert small[7]["label"] == 7
    for other in (_shapes("heldout"), _shapes(seed=1)):
        assert (small[7]["image"] != other[7]["image"]).any()
    assert small[7]["image"].dtype == np.uint8


@pytest.mark.slow
def test_raw_pixels_do_not_give_the_class_away():
    def arrays(source):
        examples = [source[i] for i in range(len(source))]
        images = np.stack([e["image"] for e in examples]).reshape(len(examples), -1) / 255.0
        return images.astype(np.float32), np.array([e["label"] for e in examples])

    train, test = arrays(_shapes(num_images=2000)), arrays(_shapes("heldout", num_images=500))
    accuracy = metrics.linear_probe(*train, *test, num_classes=len(CLASS_NAMES), steps=50)
    assert 0.05 < accuracy <= 0.6


@pytest.mark.parametrize("batch_size", [7, 10, 64])
def test_one_pass_counts_every_image_once(batch_size):
    source = _shapes(num_images=30)
    batches = list(pipeline.one_pass(source, batch_size=batch_size, num_threads=2))
    assert len(batches) == pipeline.num_batches(source, batch_size)
    mask = np.concatenate([b["mask"] for b in batches]) > 0
    images = np.concatenate([b["image"] for b in batches])[mask]
    np.testing.assert_array_equal(images, np.stack([source[i]["image"] for i in range(30)]))


def test_centre_crop_halves_then_resizes():
    pixels = np.random.default_rng(0).integers(0, 256, (140, 300, 3), np.uint8)
    image = Image.fromarray(pixels)
    box, bicubic = Image.Resampling.BOX, Image.Resampling.BICUBIC
    # Halved while the short side is at least twice 32: 140 -> 70 -> 35, then resized to 32.
    expected = image.resize((150, 70), box).resize((75, 35), box).resize((round(75 * 32 / 35), 32), bicubic)
    left = (expected.width - 32) // 2
    np.testing.assert_array_equal(centre_crop(image, 32), np.asarray(expected)[:, left : left + 32])


def _folder(root, counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 50), (i, 0, 0)).save(root / name / f"{i:03d}.png")
    return root


def test_held_out_images_of_other_classes_are_refused(tmp_path):
    for name in ("train/cat", "train/dog", "val/cat", "val/owl"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / name / "1.png")
    paths = {"path": str(tmp_path / "train"), "heldout_path": str(tmp_path / "val"), "image_size": 16}
    assert len(image_folder(**paths, split="train")) == 2
    with pytest.raises(UserError, match="heldout_path=.* has other classes than config.data.path=.*: 'dog' is"):
        image_folder(**paths, split="heldout")


def test_image_folder_splits_and_labels(tmp_path):
    root = _folder(tmp_path / "images", {"cat": 30, "ant": 12})
    parts = {s: image_folder(path=str(root), heldout_path="", split=s, image_size=16) for s in ("train", "heldout")}
    assert len(parts["train"]) + len(parts["heldout"]) == 42
    assert len(parts["heldout"]) == 3
    assert parts["train"].class_names == ("ant", "cat")
    assert parts["train"][0]["image"].shape == (16, 16, 3)
    assert {int(parts["train"][i]["label"]) for i in range(len(parts["train"]))} == {0, 1}


@pytest.mark.parametrize("kind", ["missing", "empty", "broken"])
def test_bad_folders_and_files_are_named(tmp_path, kind):
    root = tmp_path / "images"
    if kind != "missing":
        (root / "cat").mkdir(parents=True)
    if kind == "broken":
        (root / "cat" / "a.png").write_bytes(b"not a picture")
        (root / "cat" / "b.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="b.png" if kind == "broken" else "config.data.path"):
        image_folder(path=str(root), heldout_path="", split="train", image_size=16)[0]


def test_floats_and_bytes_round_trip():
    from rae_jax.models.autoencoder import to_float, to_uint8

    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(to_float(jnp.asarray(levels)) + 1e-4), levels)
    drawn = jnp.array([-0.2, 0.9, 99.6, 254.99, 255.0, 300.0]) / 255.0  # clipped, then cut off, not rounded
    np.testing.assert_array_equal(to_uint8(drawn), [0, 0, 99, 254, 255, 255])


def _photograph(folder, width=900, height=700):
    (folder / "cat").mkdir(parents=True)
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    smooth.save(folder / "cat" / "a.jpg", quality=95)
    smooth.save(folder / "cat" / "b.png")
    return smooth


def test_random_crops_are_squares_of_the_enlarged_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    image = Image.fromarray(pixels)
    large = np.asarray(image.resize((72, 48), Image.Resampling.BICUBIC))
    places = set()
    for seed in range(30):
        crop = random_crop(image, 32, np.random.default_rng(seed))
        hits = [(i, j) for i in range(17) for j in range(41) if np.array_equal(large[i : i + 32, j : j + 32], crop)]
        assert len(hits) == 1
        places.add(hits[0])
    assert len(places) > 25
    assert random_crop(image.resize((10, 200)), 32, np.random.default_rng(0)).shape == (32, 32, 3)


def test_random_crops_depend_on_seed_epoch_and_index_alone(tmp_path):
    _photograph(tmp_path)
    source = image_folder(path=str(tmp_path), heldout_path=str(tmp_path), split="train", image_size=32)

    def epochs(seed, threads=2, skip=0):
        options = {"random_crop": True, "flip": True, "num_threads": threads}
        iterator = iter(pipeline.training_batches(source, batch_size=2, seed=seed, **options))
        batches = [next(iterator)["image"] for _ in range(4)]
        return np.stack([batch[np.argsort(batch.mean((1, 2, 3)))] for batch in batches])[skip:]

    first = epochs(0)
    np.testing.assert_array_equal(first, epochs(0, threads=0))
    assert (first != epochs(1)).any() and all((first[i] != first[j]).any() for i in range(4) for j in range(i))
