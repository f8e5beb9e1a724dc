"""Decode and crop images from files.

Pixels equal the pixels of Pillow's decoder and resampling, to the last bit. If simplejpeg is installed (the extra
'fast'), it decodes ordinary JPEGs, by the same libjpeg-turbo in four fifths of the time, and most pixels outside the
crop are not computed. Such crops are within one level of Pillow's: 2 in 100,000 values differ; in a trial of odd sizes
7 of 157 million values differed by two levels.
The EXIF orientation is ignored, as in ADM's preprocessing and therefore in every published FID reference.
"""

import contextlib
import functools
import io
import struct
import zipfile
import zlib
from typing import NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from rae_jax.errors import UserError, one_line

try:
    import simplejpeg
except ImportError:  # an extra
    simplejpeg = None

SAMPLES = "images/request.json"  # is in each folder of samples; see inference.sample_files
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_FAST = "fast"  # key in the `info` of an image that simplejpeg decoded, and of images derived from it
ENLARGED = 1.5  # short side of an image over the side of its random crop


def centre_crop(image, size):
    """Return ADM's crop of a PIL image: halve it by a box filter, resize its short side (bicubic), take the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    width, height = _sides(image, size)
    left, top = (width - size) // 2, (height - size) // 2
    return _part_of_resized(image, (width, height), left, top, size)


def random_crop(image, size, rng):
    """Resize a PIL image's short side to 1.5 times `size` (bicubic) and return a random square of side `size` in it."""
    sides = _sides(image, int(ENLARGED * size))
    left, top = (int(rng.integers(side - size + 1)) for side in sides)
    return _part_of_resized(image, sides, left, top, size)


def enlarge(image, size):
    """Return a PIL image with a short side of 1.5 times `size`: the first half of `random_crop`."""
    return image.resize(_sides(image, int(ENLARGED * size)), Image.Resampling.BICUBIC)


def random_square(image, size, rng):
    """Return the pixels of a random square of a PIL image: the second half of `random_crop`."""
    left, top = (int(rng.integers(side - size + 1)) for side in image.size)
    return pixels(image.crop((left, top, left + size, top + size)))


def _sides(image, short):
    """Return width and height of an image after its short side is resized to `short`."""
    if min(image.size) == 0:
        raise ValueError(f"it has {image.width}x{image.height} pixels")
    scale = short / min(image.size)
    if image.width * image.height * scale**2 > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are too narrow a strip")
    return round(image.width * scale), round(image.height * scale)


def _part_of_resized(image, sides, left, top, size):
    """Return the pixels of a square of an RGB or RGBX image that is resized to `sides` (bicubic)."""
    across = _window(image.width, sides[0], left, size)
    down = _window(image.height, sides[1], top, size)
    # Enlarging by a simple ratio puts many points exactly between two pixels, where the least shift changes the
    # rounding.
    exact = not image.info.get(_FAST) or sides[0] > image.width or max(across.error, down.error) > 1e-5
    if exact:
        resized = image.resize(sides, Image.Resampling.BICUBIC)
    else:
        box = (across.start, down.start, across.stop, down.stop)
        part = (across.end - across.first, down.end - down.first)
        left, top = left - across.first, top - down.first
        resized = image.resize(part, Image.Resampling.BICUBIC, box)
    if resized.size != (size, size):
        resized = resized.crop((left, top, left + size, top + size))
    return pixels(resized)


class _Window(NamedTuple):
    """A part of one side of an image, before and after resizing."""

    first: int  # points of the resized side: from `first` to before `end`
    end: int
    start: float  # edges of the box in the side before resizing
    stop: float
    error: float  # the largest shift of a point, in pixels


@functools.lru_cache(maxsize=2**12)
def _window(side, resized, first, size):
    """Return the part of a side that, after resizing, holds the points from `first` to `first` + `size`.

    Pillow's box is float32, which shifts the points: by up to 3e-5 of a pixel with the tightest part. Therefore the
    best of 256 parts is chosen, which are up to 15 points wider at either end.
    """
    firsts = np.arange(max(first - 15, 0), first + 1)[:, None]
    ends = np.arange(first + size, min(first + size + 15, resized) + 1)
    scale = side / resized
    starts, stops = np.float32(firsts * scale), np.float32(ends * scale)
    # The step between points is a float32 too.
    shifts = np.maximum(abs(starts - firsts * scale), abs(starts + np.float64(stops - starts) - ends * scale))
    row, column = np.unravel_index(shifts.argmin(), shifts.shape)
    start, stop = float(starts[row, 0]), float(stops[column])
    return _Window(int(firsts[row, 0]), int(ends[column]), start, stop, float(shifts[row, column]))


def pixels(image):
    """Return the pixels uint8 [H, W, 3] of an RGB or RGBX PIL image."""
    # np.asarray takes twice as long.
    return np.frombuffer(image.tobytes("raw", "RGB"), np.uint8).reshape(image.height, image.width, 3)


def read_image(path, size, crop=centre_crop):
    """Read and crop an image file: uint8 [size, size, 3]. Raises UserError that names a file that cannot be used."""
    with naming(path):
        data = epath.Path(path).read_bytes()
    return decode(data, path, lambda image: crop(image, size))


def decode(data, name, crop):
    """Return crop(image), with an encoded image decoded to an RGB or RGBX PIL image.

    The format is read from the content, not from the name. Grey, palette and CMYK become RGB; 16 bits become 8;
    transparent pixels are put on white; an animation gives its first picture. Small images are enlarged. Raises
    UserError for an image that cannot be used.
    """
    with naming(name):
        image = _fast_jpeg(data)
        if image is not None:
            return crop(image)
        with Image.open(io.BytesIO(data)) as image:
            return crop(_to_rgb(image))


def _fast_jpeg(data):
    """Return the PIL image of an ordinary, undamaged colour JPEG; None for other data, which Pillow has to decode."""
    if simplejpeg is None or data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours != "YCbCr" or width * height > Image.MAX_IMAGE_PIXELS:
            return None
        return _rgbx(simplejpeg.decode_jpeg(data, "RGBX"))
    except ValueError:
        return None


def _rgbx(decoded):
    """Return an RGBX image that uses the memory of uint8 [H, W, 4], four bytes a pixel as in Pillow."""
    height, width, _ = decoded.shape
    image = Image.frombuffer("RGBX", (width, height), decoded, "raw", "RGBX", 0, 1)
    image.info[_FAST] = True
    return image


@contextlib.contextmanager
def naming(name):
    """Turn the errors of a damaged image into a UserError that names the image."""
    try:
        yield
    except _DAMAGED as error:
        reason = one_line(error)
        raise UserError(
            f"cannot read the image {name} ({reason}): repair it, or leave it out (on_error=skip)"
        ) from error


# The errors of Pillow for files that are damaged, unknown, or larger than its limit against decompression bombs.
_DAMAGED = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, ArithmeticError, RuntimeError, MemoryError),
    *(struct.error, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError),
)


def _to_rgb(image):
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        pixels = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, and the value of white is unknown")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode == "RGB":  # convert() would make a copy
        image.load()
        return image
    return image.convert("RGB")


def find_images(path):
    """Return the image files at `path`, sorted: the file itself, or the files in a folder and in its subfolders.

    Hidden files and folders are left out. A folder that --mode=sample has written also holds a picture of several
    images, which is left out. Raises UserError if `path` holds no image.
    """
    path = epath.Path(path)
    if (path / SAMPLES).exists():
        path = (path / SAMPLES).parent
    elif path.name == "samples" and (path.parent / "config.json").exists():
        raise UserError(f"{path} holds pictures of several images each: run --mode=sample first, or name other images")
    inside = (*path.glob("[!.]*"), *path.glob("[!.]*/[!.]*")) if path.is_dir() else (path,)
    files = sorted(file for file in inside if file.suffix.lower() in SUFFIXES and file.exists())
    if not files:
        raise UserError(f"{path} holds no image: name a {', '.join(sorted(SUFFIXES))} file, or a folder of such files")
    return files


class ImageFiles:
    """Random-access source of {'image': uint8 [size, size, 3], 'index': int32} from a list of files."""

    def __init__(self, files, image_size):
        self._files, self._size = files, image_size
        self.sides = (image_size, image_size)

    def __len__(self):
        return len(self._files)

    def __getitem__(self, index):
        return {"image": read_image(self._files[index], self._size), "index": np.int32(index)}
