"""Image files of every kind: what the 8-bit RGB of them is, or the line that names them."""

import functools
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from rae_jax.data import decode
from rae_jax.data.decode import random_crop, read_image
from rae_jax.errors import UserError

SIZE = 8
GREY = np.arange(64, dtype=np.uint8).reshape(SIZE, SIZE) * 4 + 2


def _rgb(*channels):
    return np.stack(np.broadcast_arrays(*channels), -1).astype(np.uint8)


COLOUR = _rgb(GREY, GREY.T, 255 - GREY)


def _paletted():
    image = Image.new("P", (SIZE, SIZE))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (0, 0, 4, SIZE))  # the left half blue, the right half red
    return image


def _halves(left, right):
    return np.concatenate([np.full((SIZE, 4, 3), left), np.full((SIZE, 4, 3), right)], 1)


WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)
ALPHA = np.where(np.arange(SIZE) < 4, 0, 255)[None].astype(np.uint8)  # the left half is transparent
# name: (image, arguments of save, what is expected)
KINDS = {
    "grey.png": (Image.fromarray(GREY), {}, _rgb(GREY, GREY, GREY)),
    "bits.png": (Image.fromarray(GREY > 100), {}, _rgb(*[255 * (GREY > 100)] * 3)),
    "16_bits.png": (Image.fromarray(GREY.astype(np.uint16) * 257), {}, _rgb(GREY, GREY, GREY)),
    "16_bits.tif": (Image.fromarray(GREY.astype(np.uint16) * 257 + 100), {}, _rgb(GREY, GREY, GREY)),
    "palette.png": (_paletted(), {}, _halves(BLUE, RED)),
    "palette.gif": (_paletted(), {"transparency": 1}, _halves(WHITE, RED)),
    "alpha.png": (
        Image.fromarray(np.dstack([COLOUR, ALPHA.repeat(SIZE, 0)])),
        {},
        np.where(ALPHA[..., None], COLOUR, 255),
    ),
    "grey_alpha.png": (
        Image.fromarray(np.dstack([GREY, ALPHA.repeat(SIZE, 0)]), "LA"),
        {},
        np.where(ALPHA[..., None], _rgb(GREY, GREY, GREY), 255),
    ),
    "cmyk.tif": (Image.fromarray(COLOUR).convert("CMYK"), {}, COLOUR),
    "animated.png": (
        Image.fromarray(COLOUR),
        {"save_all": True, "append_images": [Image.fromarray(255 - COLOUR)]},
        COLOUR,
    ),
    "animated.gif": (
        _paletted(),
        {"save_all": True, "append_images": [Image.new("P", (SIZE, SIZE))]},
        _halves(BLUE, RED),
    ),
    "colour.bmp": (Image.fromarray(COLOUR), {}, COLOUR),
    "colour.webp": (Image.fromarray(COLOUR), {"lossless": True}, COLOUR),
    "tiny.png": (Image.new("RGB", (1, 1), RED), {}, _halves(RED, RED)),
    "huge.png": (Image.new("RGB", (5000, 3000), BLUE), {"compress_level": 1}, _halves(BLUE, BLUE)),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_becomes_rgb(tmp_path, name):
    image, options, expected = KINDS[name]
    image.save(tmp_path / name, **options)
    found = read_image(tmp_path / name, SIZE)
    assert found.shape == (SIZE, SIZE, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_cmyk_photographs_keep_their_colours(tmp_path):
    smooth = Image.fromarray(COLOUR).resize((64, 64), Image.Resampling.BICUBIC)
    smooth.convert("CMYK").save(tmp_path / "image.jpg", quality=98)
    found = read_image(tmp_path / "image.jpg", 64).astype(int)
    assert np.abs(found - np.asarray(smooth)).mean() < 4


def _png(width, height):
    """The head of a PNG file of that size, and no more."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def _saved(tmp_path, image):
    image.save(tmp_path / "whole.png" if image.mode != "F" else tmp_path / "whole.tif")
    return next(tmp_path.glob("whole.*")).read_bytes()


def _saved_as_jpeg(image, *, sides):
    """A JPEG file whose header has other sides."""
    file = io.BytesIO()
    image.save(file, "JPEG")
    data = bytearray(file.getvalue())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", sides, sides)
    return bytes(data)


DAMAGED = {
    "empty.png": lambda path: b"",
    "text.jpg": lambda path: b"no image at all",
    "cut_off.png": lambda path: _saved(path, Image.fromarray(COLOUR))[:60],
    "bomb.png": lambda path: _png(50_000, 50_000),
    "no_pixels.png": lambda path: _png(0, 0),
    "no_pixels.gif": lambda path: b"GIF89a" + bytes(4) + b"\x80\0\0" + bytes(6) + b"," + bytes(9) + b"\x02\0;",
    "no_pixels.bmp": lambda path: b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 0, 0, 1, 24, 0, 0, 0, 0, 0, 0),
    "no_pixels.jpg": lambda path: _saved_as_jpeg(Image.fromarray(COLOUR), sides=0),
    "strip.png": lambda path: _saved(path, Image.new("L", (2, 60_000))),
    "floats.tif": lambda path: _saved(path, Image.new("F", (SIZE, SIZE))),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_cannot_be_used_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(DAMAGED[name](tmp_path))
    with pytest.raises(UserError) as refusal:
        read_image(tmp_path / name, 256)
    text = str(refusal.value)
    assert text.startswith(f"cannot read the image {tmp_path / name} (") and text.endswith(
        "): repair it, or leave it out (on_error=skip)"
    )
    assert "\n" not in text


def test_a_strip_is_too_narrow_for_a_random_crop_as_well(tmp_path):
    (tmp_path / "strip.png").write_bytes(DAMAGED["strip.png"](tmp_path))
    crop = functools.partial(random_crop, rng=np.random.default_rng(0))
    with pytest.raises(UserError, match="too narrow a strip"):
        read_image(tmp_path / "strip.png", 256, crop)


def test_the_faster_decoder_gives_the_same_pixels_and_leaves_the_rest_to_pillow(tmp_path, monkeypatch):
    pytest.importorskip("simplejpeg", reason="needs the extra 'fast'")
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (61, 83, 3), np.uint8)).resize((183, 161), Image.Resampling.BICUBIC)
    colour = [{"quality": q, "subsampling": s, "progressive": p} for q in (60, 95) for s in (0, 1, 2) for p in (0, 1)]
    files = []
    for mode, options in [("RGB", each) for each in colour] + [("L", {}), ("CMYK", {})]:
        file = io.BytesIO()
        rough.convert(mode).save(file, "JPEG", **options)
        files.append(file.getvalue())
    decoded = [decode.decode(data, "name", decode.pixels) for data in files]
    assert sum(decode._fast_jpeg(data) is not None for data in files) == len(colour)
    cut_off = files[0][: len(files[0]) // 2]
    with pytest.raises(UserError, match="cannot read the image name"):
        decode.decode(cut_off, "name", decode.pixels)
    monkeypatch.setattr(decode, "simplejpeg", None)
    for data, ours in zip(files, decoded, strict=True):
        np.testing.assert_array_equal(ours, decode.decode(data, "name", decode.pixels))


@pytest.mark.parametrize(
    "sides, levels", [((500, 375), 1), ((333, 500), 1), ((1021, 767), 1), ((20_000, 130), 0), ((100, 90), 0)]
)
def test_a_crop_of_what_the_faster_decoder_read_is_nearly_pillows(sides, levels, monkeypatch):
    """Landscape, portrait, halved before; to the last bit a strip too long for a box of float32, and the enlarged."""
    pytest.importorskip("simplejpeg", reason="needs the extra 'fast'")
    rng, file = np.random.default_rng(0), io.BytesIO()
    rough = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).resize(sides, Image.Resampling.BICUBIC)
    rough.save(file, "JPEG", quality=95)
    crops = [
        lambda image: decode.centre_crop(image, 128),
        lambda image: random_crop(image, 80, np.random.default_rng(1)),
    ]
    ours = [decode.decode(file.getvalue(), "name", crop) for crop in crops]
    monkeypatch.setattr(decode, "simplejpeg", None)
    for found, crop in zip(ours, crops, strict=True):
        moved = np.abs(found.astype(int) - decode.decode(file.getvalue(), "name", crop))
        assert moved.max() <= levels and moved.mean() < 1e-3


def test_decoded_pixels_become_an_image_without_a_copy():
    decoded = np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint8)
    image = decode._rgbx(decoded)
    decoded[2, 3] = (1, 2, 3, 4)
    assert image.getpixel((3, 2)) == (1, 2, 3, 4)
    np.testing.assert_array_equal(decode.pixels(image), decoded[..., :3])
    expected = Image.fromarray(decoded[..., :3]).resize((3, 2), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(decode.pixels(image.resize((3, 2), Image.Resampling.BICUBIC)), expected)
    image.putpixel((3, 2), (9, 9, 9, 9))  # a change is made to a copy
    assert list(decoded[2, 3]) == [1, 2, 3, 4]
