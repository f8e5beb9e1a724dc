"""The index of the images in shards: built once, and kept in a file."""

import contextlib
import hashlib
import io
import json
import os
import struct
import tokenize
import zipfile
import zlib
from typing import NamedTuple

import numpy as np
from etils import epath

from rae_jax.data import class_folders
from rae_jax.data.names import Names
from rae_jax.data.stores import LARGEST_IMAGE
from rae_jax.runtime import atomic_files, logs, processes

_VERSION = 1  # of the file; an index of another version is built again
_END = 2**16  # bytes at both ends of a file that are compared
# The errors of NumPy's reader for a damaged file.
_DAMAGED = (OSError, ValueError, LookupError, TypeError, EOFError, RuntimeError, SyntaxError, MemoryError)
_DAMAGED += (struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error)
_folder = None  # where indices are kept; None: in this process alone
_copies = False  # whether copies of images are kept there too


class Index(NamedTuple):
    """The images in some files. Each array has a value for each image."""

    shard: np.ndarray  # int32: the number of the file
    offset: np.ndarray  # int64: the place in the file of the encoded image
    length: np.ndarray  # int64
    caption_offset: np.ndarray  # int64: the place of the caption
    caption_length: np.ndarray  # int64; 0: no caption
    labels: np.ndarray  # int32; numbers in `class_names`, or as the files have them
    names: Names
    class_names: tuple  # () if labels are numbers in the files
    caption: str  # the field with the captions; '': none


class Spans:
    """Images, each a range of bytes of one of some files; see stores."""

    def __init__(self, files, index):
        self._files, self._index = files, index

    def __len__(self):
        return len(self._index.names)

    def read(self, row):
        """Return the bytes of an image. Raises ValueError if its file ends before, and for sizes that no image has."""
        index = self._index
        return self._read(row, int(index.offset[row]), int(index.length[row]))

    def captions(self, row):
        """Return the captions of an image, a list of strings."""
        offset, length = int(self._index.caption_offset[row]), int(self._index.caption_length[row])
        return captions_of(self._read(row, offset, length), self._index.caption) if length else []

    def names(self, rows):
        """Return the file and the name in it of some images."""
        files = [self._files[shard] for shard in self._index.shard[rows].tolist()]
        return [f"{file}:{name}" for file, name in zip(files, self._index.names.take(rows), strict=True)]

    def inner_names(self, rows):
        """Return the names of some images, with the names of their files without folders."""
        files = [os.path.basename(self._files[shard]) for shard in self._index.shard[rows].tolist()]
        return [f"{file}:{name}" for file, name in zip(files, self._index.names.take(rows), strict=True)]

    def _read(self, row, offset, length):
        if length > LARGEST_IMAGE:
            raise ValueError(f"its size is {length} bytes, more than {LARGEST_IMAGE}")
        with open(self._files[self._index.shard[row]], "rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) != length:
            raise ValueError(f"its file ends after {len(data)} of {length} bytes")
        return data


def classes_of(labels, count):
    """Return (labels int32 [N], class names) of labels as files have them, numbers or names.

    The class names are () if all labels are numbers. Without labels, or with -1 for all, all `count` images are one
    class.
    """
    try:
        numbers = np.array([_number(label) for label in labels], np.int64)
    except (ValueError, OverflowError):
        pass  # names
    else:
        if (numbers == -1).all():
            return np.zeros(count, np.int32), class_folders.ONE_CLASS
        return np.clip(numbers, -1, 2**31 - 1).astype(np.int32), ()
    class_names = tuple(sorted({str(label) for label in labels}))
    numbers = {name: number for number, name in enumerate(class_names)}
    return np.array([numbers[str(label)] for label in labels], np.int32), class_names


def _number(label):
    """Return a label as an integer. Raises ValueError for another one, such as a name or 0.5."""
    value = float(label)
    if not value.is_integer():
        raise ValueError(f"{label!r} is no integer")
    return int(label) if isinstance(label, int) else int(value)


def json_value(text, key):
    """Return a value in JSON by its key, KEY or KEY.KEY, or None. Raises ValueError if the text is no JSON object."""
    try:
        value = dict(json.loads(text))
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def captions_of(data, field):
    """Return the captions in the bytes of a field: a text, or by 'json.KEY' a string or a list of strings in JSON.

    Raises ValueError if the field is no JSON object.
    """
    text = data.decode("utf-8-sig", "replace")
    _, dot, key = field.partition(".")
    value = json_value(text, key) if dot else text
    values = value if isinstance(value, list) else [value]
    return [caption.strip() for caption in values if isinstance(caption, str) and caption.strip()]


def keep_in(folder, *, copies):
    """Keep the indices of shards in a folder, local or remote, from now on, and `copies` of images if they are needed.

    No result depends on it.
    """
    global _folder, _copies
    _folder, _copies = epath.Path(folder), copies


def folder_of_copies():
    """Return the folder for copies of images, on a disk of this machine; None: no copies are made."""
    return _folder if _copies and "://" not in str(_folder) else None


def digest(files, settings):
    """Return the digest that names an index: of names, sizes, times and ends of the files, and of how they are read."""
    found = [_identity(file) for file in files]
    return hashlib.sha256(json.dumps([_VERSION, found, settings]).encode()).hexdigest()[:16]


def _identity(file):
    """Return JSON values that differ for different files, without reading the whole file."""
    size = os.stat(file).st_size
    with open(file, "rb") as opened:
        ends = opened.read(_END)
        opened.seek(max(size - _END, 0))
        ends += opened.read(_END)
    return os.path.basename(file), size, os.stat(file).st_mtime_ns, hashlib.sha256(ends).hexdigest()


def of_files(files, settings, build):
    """Return the Index that `build(files)` returns, from this process or from the folder of indices if it is there."""
    name = digest(files, settings)
    if name not in _indices:
        if len(_indices) > 3:
            _indices.pop(next(iter(_indices)))
        _indices[name] = _kept(name, files, build)
    return _indices[name]


_indices = {}  # {digest: Index} of the files that were opened last


def _kept(name, files, build):
    path = None if _folder is None else _folder / f"{name}.npz"
    if path is not None and path.exists():
        with contextlib.suppress(*_DAMAGED):  # it is built again
            return _read(path.read_bytes())
    index = build(files)
    if path is not None and processes.is_first():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_files.write_bytes(path, _written(index))
        except OSError as error:
            logs.say(f"the index {path} cannot be kept ({atomic_files.reason(error)}): it is built at each start")
    return index


def _written(index):
    file, others = io.BytesIO(), {"class_names": index.class_names, "caption": index.caption}
    characters, ends = index.names.arrays()
    arrays = {name: value for name, value in index._asdict().items() if isinstance(value, np.ndarray)}
    np.savez(file, names=characters, ends=ends, others=np.array(json.dumps(others)), **arrays)
    return file.getvalue()


def _read(data):
    with np.load(io.BytesIO(data), allow_pickle=False) as found:
        arrays = {name: found[name] for name in found.files}
    others = json.loads(str(arrays.pop("others")))
    names = Names.of_arrays(arrays.pop("names"), arrays.pop("ends"))
    return Index(names=names, class_names=tuple(others["class_names"]), caption=others["caption"], **arrays)
