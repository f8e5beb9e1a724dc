"""Images from disk: decoding, cropping, and a folder of class folders as a random-access source."""

import functools
import struct
import zlib
from pathlib import Path

import numpy as np
from etils import epath
from PIL import Image

from rae_jax.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
ENLARGED = 1.5  # short side of an image over the side of its random crop
HELDOUT_EVERY = 20  # of a folder without a held-out folder beside it, every so many-th image is held out


def centre_crop(image, size):
    """ADM's crop of a PIL image: halve with a box filter, then bicubic to the short side, then the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = _to_short_side(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def random_crop(image, size, rng):
    """A PIL image's short side resized to 1.5 times `size` (bicubic), then a square of `size` anywhere in it."""
    image = _to_short_side(image, int(ENLARGED * size))
    left, top = (int(rng.integers(side - size + 1)) for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _to_short_side(image, size):
    """Bicubic, so that the short side is `size`."""
    scale = size / min(image.size)
    if image.width * image.height * scale**2 > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are too narrow a strip")
    return image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)


def read_image(path, size, crop=centre_crop, *, at_least=None):
    """Decode an image file and crop it: uint8 [size, size, 3]. Raises UserError naming a file that is not usable.

    Grey, palette and CMYK become RGB; 16 bits become 8; what is transparent lies on white; of an animation the first
    picture counts. Small images are enlarged. With `at_least`, a large JPEG file is decoded faster, at a fraction of
    its size with no side below that.
    """
    try:
        with epath.Path(path).open("rb") as file, Image.open(file) as image:
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            return crop(_to_rgb(image), size)
    except _DAMAGED as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read the image {path} ({reason}): mend or remove it") from error


# What Pillow raises for files that are damaged, unknown, or larger than its limit against decompression bombs.
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def _to_rgb(image):
    if image.mode.startswith("I;16"):  # Pillow itself would cut off at 255
        pixels = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((pixels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels are of 32 bits, and nothing says which is white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
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


class ImageFolder:
    """Random-access source of {'image': uint8 [size, size, 3], 'label': int32} from `path/CLASS/` and the images in it.

    Classes are the subfolders in alphabetical order. Without `heldout_path`, every 20th image is held out.
    Raises UserError where there is no folder, no class in it or no image.
    """

    def __init__(self, *, path, heldout_path, split, image_size):
        separate = split == "heldout" and heldout_path
        given, key = (heldout_path, "config.data.heldout_path") if separate else (path, "config.data.path")
        folder = Path(given)
        if not given or not folder.is_dir():
            raise UserError(f"{key}={given!r} is not a folder: name a folder with one subfolder of images per class")
        self.class_names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
        files = [
            (file, label)
            for label, name in enumerate(self.class_names)
            for file in sorted((folder / name).iterdir())
            if file.suffix.lower() in SUFFIXES
        ]
        if not heldout_path:
            files = [f for i, f in enumerate(files) if (i % HELDOUT_EVERY == 0) == (split == "heldout")]
        if not files:
            raise UserError(
                f"{key}={given!r} holds no images: put {', '.join(sorted(SUFFIXES))} files into one subfolder per class"
            )
        self._files = files
        self._size = image_size

    def __len__(self):
        return len(self._files)

    def __getitem__(self, index):
        file, label = self._files[index]
        return {"image": read_image(file, self._size), "label": np.int32(label)}

    def random_crop(self, index, rng):
        """Like self[index], but a random crop; large JPEG files are decoded at a fraction of their size."""
        file, label = self._files[index]
        crop = functools.partial(random_crop, rng=rng)
        image = read_image(file, self._size, crop, at_least=int(ENLARGED * self._size))
        return {"image": image, "label": np.int32(label)}
