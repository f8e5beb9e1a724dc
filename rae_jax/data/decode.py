"""Images from files: decoding and cropping.

Pixels are those of Pillow's decoder and resampling, to the last bit. Where simplejpeg is installed (the extra 'fast'),
it decodes the JPEGs that it can, by the same libjpeg-turbo in four fifths of the time, and most of what a crop leaves
out is not computed: such crops are within one level of Pillow's (2 in 100,000 values are not the same; off by two were
7 of 157 million in a trial of odd sizes).
The EXIF orientation is not followed, as ADM's preprocessing, and with it every published FID reference, does not.
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

from rae_jax.errors import UserError

try:
    import simplejpeg
except ImportError:  # an extra
    simplejpeg = None

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_FAST = "fast"  # in the `info` of an image that simplejpeg has decoded, and of what is made of it
ENLARGED = 1.5  # short side of an image over the side of its random crop


def centre_crop(image, size):
    """ADM's crop of a PIL image: halve with a box filter, then bicubic to the short side, then the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    width, height = _sides(image, size)
    left, top = (width - size) // 2, (height - size) // 2
    return _part_of_resized(image, (width, height), left, top, size)


def random_crop(image, size, rng):
    """A PIL image's short side resized to 1.5 times `size` (bicubic), then a square of `size` anywhere in it."""
    sides = _sides(image, int(ENLARGED * size))
    left, top = (int(rng.integers(side - size + 1)) for side in sides)
    return _part_of_resized(image, sides, left, top, size)


def enlarge(image, size):
    """The first half of `random_crop`: a PIL image, its short side 1.5 times `size`."""
    return image.resize(_sides(image, int(ENLARGED * size)), Image.Resampling.BICUBIC)


def random_square(image, size, rng):
    """The second half of `random_crop`."""
    left, top = (int(rng.integers(side - size + 1)) for side in image.size)
    return pixels(image.crop((left, top, left + size, top + size)))


def _sides(image, short):
    """Width and height of an image whose short side becomes `short`."""
    if min(image.size) == 0:
        raise ValueError(f"it has {image.width}x{image.height} pixels")
    scale = short / min(image.size)
    if image.width * image.height * scale**2 > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are too narrow a strip")
    return round(image.width * scale), round(image.height * scale)


def _part_of_resized(image, sides, left, top, size):
    """A square of an RGB or RGBX image resized to `sides` (bicubic)."""
    across = _window(image.width, sides[0], left, size)
    down = _window(image.height, sides[1], top, size)
    # Enlarging by a simple ratio puts many points just between two pixels, where the least move changes the rounding.
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
    first: int  # of the resized side's points
    end: int
    start: float  # of the side as it is: a box's edges
    stop: float
    error: float


@functools.lru_cache(maxsize=2**12)
def _window(side, resized, first, size):
    """Where to cut a side so that, resized, it holds the points from `first` to `first` + `size`.

    Pillow's box is float32, which moves the points: by up to 3e-5 of a pixel where the cut is as tight as can be. It is
    the best of 256 up to 15 points wider on either side instead.
    """
    firsts = np.arange(max(first - 15, 0), first + 1)[:, None]
    ends = np.arange(first + size, min(first + size + 15, resized) + 1)
    scale = side / resized
    starts, stops = np.float32(firsts * scale), np.float32(ends * scale)
    # The step between points is a float32, too.
    moved = np.maximum(abs(starts - firsts * scale), abs(starts + np.float64(stops - starts) - ends * scale))
    row, column = np.unravel_index(moved.argmin(), moved.shape)
    start, stop = float(starts[row, 0]), float(stops[column])
    return _Window(int(firsts[row, 0]), int(ends[column]), start, stop, float(moved[row, column]))


def pixels(image):
    """uint8 [H, W, 3] of an RGB or RGBX image. np.asarray takes twice as long to ask what an image is."""
    return np.frombuffer(image.tobytes("raw", "RGB"), np.uint8).reshape(image.height, image.width, 3)


def read_image(path, size, crop=centre_crop):
    """Decode an image file and crop it: uint8 [size, size, 3]. Raises UserError naming a file that is not usable."""
    with naming(path):
        data = epath.Path(path).read_bytes()
    return decode(data, path, lambda image: crop(image, size))


def decode(data, name, crop):
    """What `crop` makes of an encoded image as an RGB or RGBX PIL image. Raises UserError for one that is not usable.

    What it is, is read from its content, not from its name. Grey, palette and CMYK become RGB; 16 bits become 8; what
    is transparent lies on white; of an animation the first picture counts. Small images are enlarged.
    """
    with naming(name):
        image = _fast_jpeg(data)
        if image is not None:
            return crop(image)
        with Image.open(io.BytesIO(data)) as image:
            return crop(_to_rgb(image))


def _fast_jpeg(data):
    """A PIL image of an ordinary, faultless colour JPEG; None for anything else, of which Pillow is to judge."""
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
    """An RGBX image of uint8 [H, W, 4], four bytes a pixel as Pillow holds them: the same memory, not a copy."""
    height, width, _ = decoded.shape
    image = Image.frombuffer("RGBX", (width, height), decoded, "raw", "RGBX", 0, 1)
    image.info[_FAST] = True
    return image


@contextlib.contextmanager
def naming(name):
    """Turns what is raised for a damaged image into a UserError that names it."""
    try:
        yield
    except _DAMAGED as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read the image {name} ({reason}): mend it, or leave it out (on_error=skip)") from error


# What Pillow raises for files that are damaged, unknown, or larger than its limit against decompression bombs.
_DAMAGED = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, ArithmeticError, RuntimeError, MemoryError),
    *(struct.error, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError),
)


def _to_rgb(image):
    if image.mode.startswith("I;16"):  # Pillow itself would cut off at 255
        pixels = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are of 32 bits, and nothing says which is white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode == "RGB":  # to convert it would be to copy it
        image.load()
        return image
    return image.convert("RGB")


def find_images(path):
    """Image files at `path`, sorted: a file, those of a folder, or those of a folder and its subfolders.

    Raises UserError where there is none.
    """
    path = epath.Path(path)
    inside = (*path.glob("*"), *path.glob("*/*")) if path.is_dir() else (path,)
    files = sorted(file for file in inside if file.suffix.lower() in SUFFIXES and file.exists())
    if not files:
        raise UserError(f"{path} holds no image: name a {', '.join(sorted(SUFFIXES))} file, or a folder of such")
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
