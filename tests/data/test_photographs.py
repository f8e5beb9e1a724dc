"""Crops of real photographs, compared with their definitions, written out in Pillow."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae_jax.data import decode, sources
from rae_jax.data.pack import pack
from rae_jax.data.packed_images import PackedImages

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "imagenet_sample"
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


@pytest.fixture(params=["pillow", "simplejpeg"])
def same(request, monkeypatch):
    """assert that two crops are the same: to the last bit, or where simplejpeg decodes, as `images` promises."""
    if request.param == "pillow":
        monkeypatch.setattr(decode, "simplejpeg", None)
        return np.testing.assert_array_equal
    pytest.importorskip("simplejpeg", reason="needs the extra 'fast'")

    def nearly(found, expected, err_msg=""):
        moved = np.abs(found.astype(int) - expected)
        assert moved.max() <= 1 and moved.mean() < 1e-3, err_msg

    return nearly


def _random_crop_of(file, seed):
    return decode.read_image(
        file, 256, lambda image, size: decode.random_crop(image, size, np.random.default_rng(seed))
    )


def _square_of_resized(file, seed):
    large, rng = _resized(Image.open(file).convert("RGB"), 384), np.random.default_rng(seed)
    left, top = (int(rng.integers(side - 256 + 1)) for side in large.shape[1::-1])
    return large[top : top + 256, left : left + 256]


@pytest.mark.slow
@pytest.mark.parametrize("size", [256, 512])
def test_centre_crops_are_adms(size, same):
    assert len(FILES) == 100
    for file in FILES:
        expected = _adm(Image.open(file).convert("RGB"), size)
        same(decode.read_image(file, size), expected, err_msg=str(file))


@pytest.mark.slow
def test_random_crops_are_squares_of_the_resized_image(same):
    for number, file in enumerate(FILES):
        same(_random_crop_of(file, number), _square_of_resized(file, number), err_msg=str(file))


def test_a_few_of_both(same):
    for file in FILES[::25]:
        same(decode.read_image(file, 256), _adm(Image.open(file).convert("RGB"), 256))
        same(_random_crop_of(file, 0), _square_of_resized(file, 0))


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
