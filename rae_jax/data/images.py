"""Images from files: decoding and cropping.

Pixels are those of Pillow's decoder and resampling, to the last bit; where simplejpeg is installed (the extra 'fast'),
it decodes what it can, by the same libjpeg-turbo in four fifths of the time. The EXIF orientation is not followed, as
ADM's preprocessing, and with it every published FID reference, does not.
"""

import contextlib
import io
import struct
import zipfile
import zlib

import numpy as np
from etils import epath
from PIL import Image

from rae_jax.errors import UserError

try:
    import simplejpeg
except ImportError:  # an extra
    simplejpeg = None

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
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
    return _pixels(image.crop((left, top, left + size, top + size)))


def _sides(image, short):
    """Width and height of an image whose short side becomes `short`."""
    if min(image.size) == 0:
        raise ValueError(f"it has {image.width}x{image.height} pixels")
    scale = short / min(image.size)
    if image.width * image.height * scale**2 > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are too narrow a strip")
    return round(image.width * scale), round(image.height * scale)


def _part_of_resized(image, sides, left, top, size):
    """A square of an RGB image resized to `sides` (bicubic), without computing all the rest.

    Pillow resizes along rows, then along columns: the first is done for the rows that the square needs, the second for
    its columns. Its `box` would spare more, but is of float32, which moves pixels.
    """
    scale = image.height / sides[1]
    reach = 2 * max(scale, 1) + 1  # of the kernel, and one for rounding
    above, below = max(int(top * scale - reach), 0), min(int((top + size) * scale + reach) + 1, image.height)
    wide = _rows(image, above, below).resize((sides[0], below - above), Image.Resampling.BICUBIC)
    strip = wide if sides[0] == size else wide.crop((left, 0, left + size, wide.height))
    if strip.height < image.height:
        placed = Image.new("RGB", (size, image.height), None)  # what lies above and below does not matter
        placed.paste(strip, (0, above))
        strip = placed
    return _pixels(_rows(strip.resize((size, sides[1]), Image.Resampling.BICUBIC), top, top + size))


def _pixels(image):
    """uint8 [H, W, 3] of an RGB image, as np.asarray has it, which takes twice as long to ask what it is."""
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3)


def _rows(image, first, end):
    return image if end - first == image.height else image.crop((0, first, image.width, end))


def read_image(path, size, crop=centre_crop):
    """Decode an image file and crop it: uint8 [size, size, 3]. Raises UserError naming a file that is not usable."""
    with naming(path):
        data = epath.Path(path).read_bytes()
    return decode(data, path, lambda image: crop(image, size))


def decode(data, name, crop):
    """What `crop` makes of an encoded image as an RGB PIL image. Raises UserError naming one that is not usable.

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
        return _rgb(simplejpeg.decode_jpeg(data, "RGBX"))
    except ValueError:
        return None


def _rgb(pixels):
    """An RGB image of uint8 [H, W, 4], four bytes a pixel as Pillow holds them: the same memory, not a copy."""
    height, width, _ = pixels.shape
    image = Image.frombuffer("RGBX", (width, height), pixels, "raw", "RGBX", 0, 1)
    if not hasattr(image.im, "setmode"):  # which Pillow uses itself, but does not document
        return image.convert("RGB")
    image.im.setmode("RGB")
    image._mode = "RGB"
    return image


@contextlib.contextmanager
def naming(name):
    """Turns what is raised for a damaged image into a UserError that names it."""
    try:
        yield
    except _DAMAGED as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read the image {name} ({reason}): mend or remove it") from error


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

    def __len__(self):
        return len(self._files)

    def __getitem__(self, index):
        return {"image": read_image(self._files[index], self._size), "index": np.int32(index)}
