"""Random-access sources of encoded images with labels: folders, lists, zip archives and TFDS.

A store holds the images: len(store), store.read(index) -> (bytes, label), store.name(index) for messages.
"""

import functools
import os
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np

from rae_jax.data import decode
from rae_jax.errors import UserError, one_line

LARGEST_ENTRY = 2**28  # bytes of an unpacked entry of an archive: no image is larger
HELDOUT_EVERY = 20  # without separate held-out images, every 20th image is held out


class ImageSource:
    """Random-access source of {'image': uint8 [size, size, 3], 'label': int32} from a store.

    Reading raises UserError if an image cannot be used, or if its label is not the number of a class.
    """

    def __init__(self, store, class_names, image_size):
        self.class_names = class_names
        self._store, self._size = store, image_size

    def __len__(self):
        return len(self._store)

    def __getitem__(self, index):
        return self.example(index, lambda image: decode.centre_crop(image, self._size))

    def random_crop(self, index, rng):
        """Return self[index] with a random crop."""
        return self.example(index, lambda image: decode.random_crop(image, self._size, rng))

    def example(self, index, crop):
        """Return image `index`, as `crop` computes it from a PIL image, and its label."""
        name = self._store.name(index)
        with decode.naming(name):
            data, label = self._store.read(index)
        if not 0 <= label < len(self.class_names):
            raise UserError(
                f"{name} has label {label}, outside of 0 to {len(self.class_names) - 1}: correct or remove it"
            )
        return {"image": decode.decode(data, name, crop), "label": np.int32(label)}

    def name(self, index):
        """Return the name of image `index`, for messages: its path, or its place in an archive."""
        return self._store.name(index)

    def image_names(self):
        """Return the names and labels of all images without the place of the data, as far as they are known."""
        return self._store.image_names()


KEYS = ("config.data.path", "config.data.heldout_path")  # names of the two paths of images, for messages
FLAGS = ("--path", "--heldout_path")  # the same in commands that take paths as flags


def image_folder(*, path, heldout_path, split, image_size, num_classes=None, named=KEYS):
    """Return the source of the images of 'train' or 'heldout' at a path: a folder, a .zip archive or a list.

    Folders and archives hold CLASS/IMAGE, at any depth in archives; classes are in alphabetical order. A list is a text
    file with a line `IMAGE LABEL` for each image, IMAGE relative to the list, LABEL from 0 (to `num_classes` - 1, if
    given). Without `heldout_path`, every 20th image is held out. Raises UserError if a path cannot be used, or if the
    two folders have different classes. `named`: the names of the two paths in messages.
    """
    separate = split == "heldout" and bool(heldout_path)
    given, key = (heldout_path, named[1]) if separate else (path, named[0])
    store, class_names = _open(given, key, num_classes)
    if separate and _both_folders(path, given) and class_names != (others := _classes_in(_path(path))):
        odd = sorted(set(class_names) ^ set(others))[0]
        raise UserError(
            f"{key}={given!r} has other class folders than {named[0]}={path!r}: {odd!r} is in only one; add it"
        )
    if not heldout_path:
        chosen = [i for i in range(len(store)) if (i % HELDOUT_EVERY == 0) == (split == "heldout")]
        store = store.subset(chosen)
    if not len(store):
        raise UserError(f"{key}={given!r} holds no images of the split {split}: put more into one subfolder per class")
    return ImageSource(store, class_names, image_size)


def _path(given):
    return Path(os.path.expanduser(given))


def _both_folders(*paths):
    return all(_path(path).is_dir() for path in paths)


def _open(given, key, num_classes):
    """Return (store, class names) of all images at a path; a path is listed again only if it has changed."""
    path = _path(given)
    if given and path.is_dir():
        return _open_folder(path, _changed(path, *(path / name for name in _classes_in(path))))
    if given and path.is_file():
        if zipfile.is_zipfile(path):
            return _open_zip(path, key, _changed(path))
        return _open_list(path, key, num_classes, _changed(path))
    raise UserError(
        f"{key}={given!r} does not exist: name a folder with one subfolder of images per class, a .zip archive of such "
        f"a folder, or a list of images"
    )


def _changed(*paths):
    """Return the times of the last change of files and folders, and their sizes."""
    return tuple((found.st_mtime_ns, found.st_size) for found in map(os.stat, paths))


class _Files:
    """Store of (path, label) pairs, of files below a folder."""

    def __init__(self, folder, files):
        self._folder, self._files = folder, files

    def __len__(self):
        return len(self._files)

    def read(self, index):
        path, label = self._files[index]
        with open(path, "rb") as file:
            return file.read(), label

    def name(self, index):
        return str(self._files[index][0])

    def image_names(self):
        return [(path.removeprefix(self._folder), label) for path, label in self._files]

    def subset(self, indices):
        return _Files(self._folder, [self._files[i] for i in indices])


@functools.lru_cache(maxsize=2)
def _open_folder(folder, changed):
    class_names = _classes_in(folder)
    files = [
        (str(file), label)
        for label, name in enumerate(class_names)
        for file in sorted((folder / name).iterdir())
        if file.suffix.lower() in decode.SUFFIXES
    ]
    return _Files(str(folder), files), class_names


def _classes_in(folder):
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))


@functools.lru_cache(maxsize=2)
def _open_list(path, key, num_classes, changed):
    files = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{key}={str(path)!r} is neither a folder, a .zip archive nor a text file: name one of these"
        ) from error
    for number, line in enumerate(lines, 1):
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal():
            raise UserError(
                f"{path}, line {number}: {line[:80]!r} is not `IMAGE LABEL` with a label from 0: correct it"
            )
        if num_classes is not None and int(label) >= num_classes:
            raise UserError(f"{path}, line {number}: label {label} is outside of 0 to {num_classes - 1}: correct it")
        files.append((str(path.parent / name.strip()), int(label)))
    count = num_classes or 1 + max((label for _, label in files), default=-1)
    return _Files(str(path.parent), files), tuple(str(label) for label in range(count))


class _Zip:
    """Store of (entry, label) pairs in a zip archive; entries are read in place and never unpacked to disk."""

    def __init__(self, path, entries):
        self._path, self._entries = path, entries

    def __len__(self):
        return len(self._entries)

    def read(self, index):
        entry, label = self._entries[index]
        size = self._archive.getinfo(entry).file_size  # at most this size is unpacked
        if size > LARGEST_ENTRY:
            raise ValueError(f"its unpacked size is {size} bytes, more than {LARGEST_ENTRY}")
        return self._archive.read(entry), label

    def name(self, index):
        return f"{self._path}:{self._entries[index][0]}"

    def image_names(self):
        return self._entries

    def subset(self, indices):
        return _Zip(self._path, [self._entries[i] for i in indices])

    @functools.cached_property
    def _archive(self):
        return zipfile.ZipFile(self._path)

    def __getstate__(self):  # each worker opens the archive itself
        return {key: value for key, value in self.__dict__.items() if key != "_archive"}


@functools.lru_cache(maxsize=2)
def _open_zip(path, key, changed):
    with decode.naming(path), zipfile.ZipFile(path) as archive:
        entries = sorted(info.filename for info in archive.infolist() if not info.is_dir())
    for entry in entries:
        if entry.startswith(("/", "\\")) or ".." in PurePosixPath(entry.replace("\\", "/")).parts:
            raise UserError(f"{key}={str(path)!r} has the entry {entry!r}, which is outside of the archive: remove it")
    entries = [entry for entry in entries if PurePosixPath(entry).suffix.lower() in decode.SUFFIXES]
    class_names = tuple(sorted({PurePosixPath(entry).parent.name for entry in entries}))
    labels = {name: label for label, name in enumerate(class_names)}
    return _Zip(path, [(entry, labels[PurePosixPath(entry).parent.name]) for entry in entries]), class_names


class _Tfds:
    """Store of the records of a TFDS data source."""

    def __init__(self, name, records):
        self._name, self._records = name, records

    def __len__(self):
        return len(self._records)

    def read(self, index):
        record = self._records[index]
        return record["image"], int(record["label"])

    def name(self, index):
        return f"{self._name}, record {index}"

    def image_names(self):
        return ((self._name, len(self._records)),)


def tfds(*, name, data_dir, split, image_size):
    """Return the source of a split of a TFDS data set that was prepared as array_record; TensorFlow is not needed.

    `name` is TFDS' name (NAME[/CONFIG][:VERSION]), `data_dir` TFDS' data folder, '' for the default. The features are
    'image' and 'label'. Raises UserError if the data set does not exist or is of another kind.
    """
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError("config.data.source='tfds' needs tensorflow-datasets: pip install -e '.[tfds]'") from error
    try:
        builder = tensorflow_datasets.builder(name, data_dir=data_dir or None)
        class_names = tuple(builder.info.features["label"].names)
        decoders = {"image": tensorflow_datasets.decode.SkipDecoding()}
        records = builder.as_data_source(split=split, decoders=decoders)
    except Exception as error:  # TFDS has no class for errors that a user can fix
        raise UserError(
            f"config.data.tfds.name={name!r} cannot be read from config.data.path={data_dir!r} "
            f"({one_line(error, longest=200)}): it must be prepared with file_format='array_record' and have "
            f"'image' and 'label'"
        ) from error
    return ImageSource(_Tfds(f"{name} {split}", records), class_names, image_size)
