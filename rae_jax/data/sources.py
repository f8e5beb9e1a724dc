"""Encoded images with labels as a random-access source: from folders, lists, zip archives and TFDS.

What holds the images is a store: len(store), store.read(index) -> (bytes, label), store.name(index) for messages.
"""

import functools
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np

from rae_jax.data import decode
from rae_jax.errors import UserError

LARGEST_ENTRY = 2**28  # bytes of an archive's entry when unpacked: no image is larger
HELDOUT_EVERY = 20  # where no images are set apart for evaluation, every so many-th one is held out


class ImageSource:
    """Random-access source of {'image': uint8 [size, size, 3], 'label': int32} from a store.

    Reading raises UserError where an image is not usable, or its label is outside of the classes.
    """

    def __init__(self, store, class_names, image_size):
        self.class_names = class_names
        self._store, self._size = store, image_size

    def __len__(self):
        return len(self._store)

    def __getitem__(self, index):
        return self.example(index, lambda image: decode.centre_crop(image, self._size))

    def random_crop(self, index, rng):
        """Like self[index], but a random crop."""
        return self.example(index, lambda image: decode.random_crop(image, self._size, rng))

    def example(self, index, crop):
        """Image `index` as `crop` makes it from a PIL image, and its label."""
        name = self._store.name(index)
        with decode.naming(name):
            data, label = self._store.read(index)
        if not 0 <= label < len(self.class_names):
            raise UserError(f"{name} has label {label}, outside of 0 to {len(self.class_names) - 1}: mend or remove it")
        return {"image": decode.decode(data, name, crop), "label": np.int32(label)}

    def name(self, index):
        """Where image `index` comes from."""
        return self._store.name(index)


KEYS = ("config.data.path", "config.data.heldout_path")  # what a user calls the two paths of images
FLAGS = ("--path", "--heldout_path")  # and of the commands that take them


def image_folder(*, path, heldout_path, split, image_size, num_classes=None, named=KEYS):
    """The images of 'train' or 'heldout' at a path: a folder, a .zip archive or a list.

    Folders and archives hold CLASS/IMAGE, at any depth in archives; classes are in alphabetical order. A list is a text
    file with a line `IMAGE LABEL` for each, IMAGE relative to the list, LABEL from 0 (to `num_classes` - 1, if given).
    Without `heldout_path`, every 20th image is held out. Raises UserError where there is nothing of the kind, or
    the two folders' classes differ; `named`: what the user calls the two paths.
    """
    separate = split == "heldout" and bool(heldout_path)
    given, key = (heldout_path, named[1]) if separate else (path, named[0])
    store, class_names = _open(given, key, num_classes)
    if separate and Path(path).is_dir() and Path(given).is_dir() and class_names != (others := _classes_in(Path(path))):
        odd = sorted(set(class_names) ^ set(others))[0]
        raise UserError(f"{key}={given!r} has other class folders than {named[0]}={path!r}: {odd!r} is in one alone")
    if not heldout_path:
        chosen = [i for i in range(len(store)) if (i % HELDOUT_EVERY == 0) == (split == "heldout")]
        store = store.subset(chosen)
    if not len(store):
        raise UserError(f"{key}={given!r} holds no images of the {split} part: put more into one subfolder per class")
    return ImageSource(store, class_names, image_size)


def _open(given, key, num_classes):
    path = Path(given)
    if given and path.is_dir():
        return _open_folder(path)
    if given and path.is_file():
        return _open_zip(path, key) if zipfile.is_zipfile(path) else _open_list(path, key, num_classes)
    raise UserError(
        f"{key}={given!r} is not there: name a folder with one subfolder of images per class, a .zip archive of such, "
        f"or a list of images"
    )


class _Files:
    """Store of (path, label) pairs."""

    def __init__(self, files):
        self._files = files

    def __len__(self):
        return len(self._files)

    def read(self, index):
        path, label = self._files[index]
        with open(path, "rb") as file:
            return file.read(), label

    def name(self, index):
        return str(self._files[index][0])

    def subset(self, indices):
        return _Files([self._files[i] for i in indices])


def _open_folder(folder):
    class_names = _classes_in(folder)
    files = [
        (str(file), label)
        for label, name in enumerate(class_names)
        for file in sorted((folder / name).iterdir())
        if file.suffix.lower() in decode.SUFFIXES
    ]
    return _Files(files), class_names


def _classes_in(folder):
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))


def _open_list(path, key, num_classes):
    files = []
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{key}={str(path)!r} is neither a folder, a .zip archive nor a text file") from error
    for number, line in enumerate(lines, 1):
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal():
            raise UserError(f"{path}, line {number}: {line[:80]!r} is not `IMAGE LABEL` with a label from 0")
        if num_classes is not None and int(label) >= num_classes:
            raise UserError(f"{path}, line {number}: label {label} is outside of 0 to {num_classes - 1}")
        files.append((str(path.parent / name.strip()), int(label)))
    count = num_classes or 1 + max((label for _, label in files), default=-1)
    return _Files(files), tuple(str(label) for label in range(count))


class _Zip:
    """Store of (entry, label) pairs in a zip archive, whose entries are read in place and never unpacked."""

    def __init__(self, path, entries):
        self._path, self._entries = path, entries

    def __len__(self):
        return len(self._entries)

    def read(self, index):
        entry, label = self._entries[index]
        size = self._archive.getinfo(entry).file_size  # no more than that is unpacked
        if size > LARGEST_ENTRY:
            raise ValueError(f"it unpacks to {size} bytes")
        return self._archive.read(entry), label

    def name(self, index):
        return f"{self._path}:{self._entries[index][0]}"

    def subset(self, indices):
        return _Zip(self._path, [self._entries[i] for i in indices])

    @functools.cached_property
    def _archive(self):
        return zipfile.ZipFile(self._path)

    def __getstate__(self):  # a worker opens the archive itself
        return {key: value for key, value in self.__dict__.items() if key != "_archive"}


def _open_zip(path, key):
    with decode.naming(path), zipfile.ZipFile(path) as archive:
        entries = sorted(info.filename for info in archive.infolist() if not info.is_dir())
    for entry in entries:
        if entry.startswith(("/", "\\")) or ".." in PurePosixPath(entry.replace("\\", "/")).parts:
            raise UserError(f"{key}={str(path)!r} has the entry {entry!r}, which climbs out of the archive: remove it")
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


def tfds(*, name, data_dir, split, image_size):
    """The images of a split of a TFDS data set that was prepared as array_record; TensorFlow is not needed.

    `name` as TFDS has it (NAME[/CONFIG][:VERSION]), `data_dir` '' for TFDS' own. Its features are 'image' and 'label'.
    Raises UserError where it is not there, or of another kind.
    """
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError("config.data.source='tfds' needs tensorflow-datasets (pip install -e '.[tfds]')") from error
    try:
        builder = tensorflow_datasets.builder(name, data_dir=data_dir or None)
        class_names = tuple(builder.info.features["label"].names)
        decoders = {"image": tensorflow_datasets.decode.SkipDecoding()}
        records = builder.as_data_source(split=split, decoders=decoders)
    except Exception as error:  # TFDS has no class of its own for what a user can mend
        raise UserError(
            f"config.data.tfds.name={name!r} cannot be read from config.data.path={data_dir!r} "
            f"({' '.join(str(error).split())[:200]}): it must be prepared with file_format='array_record' and have "
            f"'image' and 'label'"
        ) from error
    return ImageSource(_Tfds(f"{name} {split}", records), class_names, image_size)
