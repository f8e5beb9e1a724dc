"""Crops of real photographs, beside the definitions written out in Pillow."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae_jax.data import images, sources
from rae_jax.data.pack import pack
from rae_jax.data.packed import PackedImages

PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "data" / "imagenet_sample"
FILES = sorted(PHOTOGRAPHS.glob("*/*"))
pytestmark = pytest.mark.skipif(not FILES, reason="../shared/data/imagenet_sample is not there")


def _adm(image, size):
    """center_crop_arr of ADM, step by step."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def _resized(image, short):
    """The stage-1 recipe's resize of the short side, bicubic."""
    scale = short / min(*image.size)
    return np.array(image.resize(tuple(round(side * scale) for side in image.size), resample=Image.BICUBIC))


@pytest.mark.slow
@pytest.mark.parametrize("size", [256, 512])
def test_centre_crops_are_adms_to_the_last_bit(size):
    assert len(FILES) == 100
    for file in FILES:
        expected = _adm(Image.open(file).convert("RGB"), size)
        np.testing.assert_array_equal(images.read_image(file, size), expected, err_msg=str(file))


@pytest.mark.slow
def test_random_crops_are_squares_of_the_resized_image_to_the_last_bit():
    for number, file in enumerate(FILES):
        large = _resized(Image.open(file).convert("RGB"), 384)
        rng = np.random.default_rng(number)
        left, top = (int(rng.integers(side - 256 + 1)) for side in large.shape[1::-1])
        found = images.read_image(
            file, 256, lambda image, size, n=number: images.random_crop(image, size, np.random.default_rng(n))
        )
        np.testing.assert_array_equal(found, large[top : top + 256, left : left + 256], err_msg=str(file))


def test_a_few_of_both():
    for file in FILES[::25]:
        image = Image.open(file).convert("RGB")
        np.testing.assert_array_equal(images.read_image(file, 256), _adm(image, 256))
        rng, again = np.random.default_rng(0), np.random.default_rng(0)
        left, top = (int(again.integers(side - 256 + 1)) for side in _resized(image, 384).shape[1::-1])
        expected = _resized(image, 384)[top : top + 256, left : left + 256]
        np.testing.assert_array_equal(images.random_crop(image, 256, rng), expected)


@pytest.mark.slow
def test_packed_photographs_are_those_photographs(tmp_path):
    """Losslessly: to the last bit. As JPEG of quality 95: 40 dB and more."""
    parts = {
        split: sources.image_folder(path=str(PHOTOGRAPHS), heldout_path="", split=split, image_size=256)
        for split in ("train", "heldout")
    }
    form = {"image_size": 256, "crop": "centre", "quality": 95, "images_per_shard": 40, "num_workers": 1}
    for encoding in ("png", "jpeg"):
        pack(parts, tmp_path / encoding, **form, encoding=encoding, on_error="stop")
        found = PackedImages(path=tmp_path / encoding, split="train", image_size=256)
        errors = [found[i]["image"].astype(float) - parts["train"][i]["image"] for i in range(len(found))]
        if encoding == "png":
            assert not np.any(errors)
        else:
            assert np.mean([20 * np.log10(255 / np.sqrt((e**2).mean())) for e in errors]) > 40
