"""Sets of images in the formats of evaluators: ADM's .npz files with images or moments of features, and folders."""

import struct
import tokenize
import zipfile
import zlib

import numpy as np
from etils import epath

from rae_jax.data.decode import ImageFiles, find_images
from rae_jax.errors import UserError, one_line

IMAGES, LABELS = "arr_0", "arr_1"
MOMENTS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
_LOCAL_HEADER = 30  # bytes of the header of a zip member, before its name and its extra field
# The errors of numpy and zipfile for files that are cut off, garbled, encrypted or of another kind.
_DAMAGED = (
    *(OSError, ValueError, EOFError, LookupError, ArithmeticError, MemoryError, RuntimeError, SyntaxError, TypeError),
    *(struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


def open_images(path, image_size, *, labelled=True):
    """Return a source of the images at `path`: an npz with images of any size, or a folder, cropped to `image_size`.

    With `labelled` the source has the labels of the npz. Returns None for an npz without images. Raises UserError if
    `path` does not exist or cannot be used.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError("it does not exist: name an .npz file or a folder of images")
    if path.suffix != ".npz":
        return ImageFiles(find_images(path), image_size)
    return _NpzImages(path, labelled) if IMAGES in _names(path) else None


def read_moments(path, sizes):
    """Return the moments that an npz holds, {kind: (mean [D], covariance [D, D]) float64}; {} for a folder.

    `sizes` are the possible kinds, {kind: D}. Raises UserError if moments are incomplete, of another shape or not
    finite.
    """
    path = epath.Path(path)
    if path.suffix != ".npz":
        return {}
    present, found = _names(path), {}
    for kind, size in sizes.items():
        names = [name for name in MOMENTS[kind] if name in present]
        if not names:
            continue
        if len(names) == 1:
            (lacking,) = set(MOMENTS[kind]) - set(names)
            raise UserError(f"it holds {names[0]} without {lacking}: moments need both")
        found[kind] = tuple(
            _moment(path, name, shape) for name, shape in zip(names, ((size,), (size, size)), strict=True)
        )
    return found


def _moment(path, name, shape):
    values = _read(path, name)
    if values.shape != shape:
        raise UserError(f"{name} has shape {values.shape}, not {shape}: it holds moments of other features")
    if not np.isfinite(values).all():
        raise UserError(f"{name} holds values that are not finite: make the file again")
    return values.astype(np.float64)


class _NpzImages:
    """Random-access source of {'image': uint8 [H, W, 3], and 'label': int32 if the file has labels}."""

    def __init__(self, path, labelled):
        self._images = _map(path, IMAGES)
        shape, dtype = self._images.shape, self._images.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            raise UserError(f"{IMAGES} is {dtype} {shape}, not images: it must be uint8 [N, H, W, 3]")
        self.sides = shape[1:3]
        self.labels = _labels(path, len(self._images)) if labelled else None

    def __len__(self):
        return len(self._images)

    def __getitem__(self, index):
        label = {} if self.labels is None else {"label": self.labels[index]}
        return {"image": np.array(self._images[index]), **label}


def _labels(path, count):
    if LABELS not in _names(path):
        return None
    labels = _read(path, LABELS)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{LABELS} is {labels.dtype} {labels.shape}, not {count} integers: it must hold one label for each image"
        )
    return labels.astype(np.int32)


def _names(path):
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except _DAMAGED as error:
        raise _not_whole(error) from error


def _read(path, name):
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return archive[name]
    except _DAMAGED as error:
        raise _not_whole(error) from error


def _not_whole(error):
    return UserError(f"it is not a whole npz file ({one_line(error)}): make it again")


def _map(path, name):
    """Return an array of an npz, mapped to memory if it is uncompressed on a local disk: 50,000 images are 10 GB."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            member = archive.getinfo(f"{name}.npy")
            file.seek(member.header_offset)
            header = file.read(_LOCAL_HEADER)
            file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), 1)
            version = np.lib.format.read_magic(file) if member.compress_type == zipfile.ZIP_STORED else None
            if "://" in str(path) or version != (1, 0):
                return _read(path, name)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            if fortran_order or dtype.hasobject or 0 in shape:
                return _read(path, name)
            return np.memmap(path, dtype, "r", file.tell(), shape)
    except _DAMAGED as error:
        raise _not_whole(error) from error
