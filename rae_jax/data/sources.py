"""Random-access sources of encoded images with labels: folders, lists, zip archives, shards and TFDS."""

import functools
import os
from typing import NamedTuple

import numpy as np

from rae_jax.data import (
    class_folders,
    decode,
    label_files,
    listing,
    parquet_copy,
    parquet_files,
    shard_index,
    shards,
    stores,
    tar_shards,
)
from rae_jax.errors import UserError, one_line

HELDOUT_EVERY = 20  # without separate held-out images, every 20th image is held out


class ImageSource:
    """Random-access source of {'image': uint8 [size, size, 3], 'label': int32} from a store (see stores).

    Examples have no 'label' if `labelled` is False. Reading raises UserError if an image cannot be used, or if its
    label is not the number of a class.
    """

    def __init__(self, store, class_names, image_size):
        self.class_names, self.labelled = class_names, store.labelled
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
        if self.labelled and not 0 <= label < len(self.class_names):
            raise UserError(
                f"{name} has label {label}, outside of 0 to {len(self.class_names) - 1}: correct or remove it"
            )
        image = decode.decode(data, name, crop)
        return {"image": image, "label": np.int32(label)} if self.labelled else {"image": image}

    def name(self, index):
        """Return the name of image `index`, for messages: its path, or its place in an archive."""
        return self._store.name(index)

    def names(self):
        """Return the names of all images, as `name` returns them."""
        return self._store.names()

    def image_names(self):
        """Return the names and labels of all images without the place of the data, as far as they are known."""
        return self._store.image_names()

    def captions(self, index):
        """Return the captions of image `index`, a list of strings."""
        return self._store.captions(index)


class Settings(NamedTuple):
    """Names of the settings of a source, for messages. `field` has a place for the name of a field of shards."""

    path: str
    heldout_path: str
    heldout_labels: str
    field: str


KEYS = Settings("config.data.path", "config.data.heldout_path", "config.data.heldout_labels", "config.data.fields.{}")
FLAGS = Settings("--path", "--heldout_path", "--heldout_labels", "--{}_field")  # of commands that take paths as flags


def image_folder(
    *,
    path,
    heldout_path,
    split,
    image_size,
    heldout_labels="",
    num_classes=None,
    on_error="stop",
    named=KEYS,
):
    """Return the source of the images of 'train' or 'heldout' at a path: a folder, a .zip archive or a list.

    Folders and archives hold CLASS/IMAGE or CLASS/.../IMAGE, with classes in alphabetical order; images without a
    folder are one class. A list is a text file with a line `IMAGE LABEL` for each image, IMAGE relative to the list,
    LABEL from 0 (to `num_classes` - 1, if given).

    Without `heldout_path`, every 20th image is held out. Held-out images without class folders have the labels of the
    file `heldout_labels` (see label_files), or no labels. Raises UserError if a path cannot be used, or if the classes
    of both differ. `on_error`: see listing. `named`: see Settings.
    """

    def images_at(given, key):
        return listing.images_at(given, key, named, num_classes=num_classes, on_error=on_error)

    if heldout_labels and not heldout_path:
        raise UserError(
            f"{named.heldout_labels}={heldout_labels!r} needs {named.heldout_path}: set it to the images with these "
            f"labels"
        )
    return _of_split(images_at, (path, heldout_path, heldout_labels), split, image_size, named)


NO_FIELDS = {"image": "", "label": "", "caption": ""}  # the usual ones are looked for


def webdataset(*, path, heldout_path, split, image_size, num_classes=None, fields=NO_FIELDS, named=KEYS):
    """Return the source of the images of 'train' or 'heldout' in WebDataset's tar files; see tar_shards and shards.

    Without a field of labels all images are one class. The other arguments and errors are those of image_folder.
    """

    def images_at(given, key):
        files = shards.files_at(given, key, ".tar", named)
        build = functools.partial(tar_shards.index, fields=fields, named=named)
        index = shard_index.of_files(files, fields, build)
        images = shard_index.Spans(files, index)
        return _found(images, index.labels, index.class_names, num_classes, f"{key}={given!r}")

    return _of_split(images_at, (path, heldout_path, ""), split, image_size, named)


def parquet(*, path, heldout_path, split, image_size, num_classes=None, fields=NO_FIELDS, named=KEYS):
    """Return the source of the images of 'train' or 'heldout' in parquet files; see parquet_files and shards.

    Without a column of labels all images are one class. The other arguments and errors are those of image_folder.
    """

    def images_at(given, key):
        files = shards.files_at(given, key, ".parquet", named)
        rows, labels, class_names = parquet_files.rows_of(files, fields, named)
        images = parquet_copy.for_random_order(rows, files, fields)
        return _found(images, labels, class_names, num_classes, f"{key}={given!r}")

    return _of_split(images_at, (path, heldout_path, ""), split, image_size, named)


def _found(images, labels, class_names, num_classes, value):
    """Return the listing.Found of shards. Raises UserError for labels from `num_classes` on."""
    numbered, most = not class_names, num_classes or label_files.MOST_CLASSES
    largest = int(labels.max(initial=-1))
    if numbered and largest >= most:
        name = images.names([int(labels.argmax())])[0]
        raise UserError(
            f"{value}: {name} has label {largest}, outside of 0 to {most - 1}: correct it, or the number of classes"
        )
    names = tuple(map(str, range(num_classes or 1 + largest))) if numbered else class_names
    return listing.Found(images, labels, names, numbered)


def _of_split(images_at, paths, split, image_size, named):
    """Return the source of a split; images_at(path, key) returns the listing.Found of all images at a path."""
    path, heldout_path, _ = paths
    separate = split == "heldout" and bool(heldout_path)
    given, key = (heldout_path, named.heldout_path) if separate else (path, named.path)
    found = images_at(given, key)
    if not len(found.images):
        raise listing.no_images(
            f"{key}={given!r}", fix="name shards whose samples have images, such as KEY.jpg in tar files"
        )
    store, class_names = stores.Store(found.images, found.labels), found.class_names
    if separate:
        store, class_names = _with_classes_of(images_at, found, paths, named)
    elif not heldout_path:
        held_out = np.arange(len(store)) % HELDOUT_EVERY == 0
        store = store.subset(np.flatnonzero(held_out == (split == "heldout")))
    if not len(store):
        raise UserError(
            f"{key}={given!r} holds a single image, which is held out: add images, or set {named.heldout_path}"
        )
    return ImageSource(store, class_names, image_size)


def _with_classes_of(images_at, found, paths, named):
    """Return (store, class names) of separate held-out images `found`, with the classes of the training images.

    If the training images are not on this machine, held-out images in class folders have their own classes.
    """
    path, heldout_path, heldout_labels = paths
    flat = found.class_names == class_folders.ONE_CLASS
    if not (flat or heldout_labels or _may_exist(path)):
        return stores.Store(found.images, found.labels), found.class_names
    train = images_at(path, named.path)
    # One folder that is no class: the folder around flat images, as in an archive of ImageNet's val.
    flat |= len(found.class_names) == 1 and not found.numbered and found.class_names[0] not in train.class_names
    if heldout_labels:
        given = f"{named.heldout_labels}={heldout_labels!r}"
        names = [name for name, _ in stores.Store(found.images, None).image_names()]
        labels = label_files.labels_of(heldout_labels, names, train.class_names, given)
        return stores.Store(found.images, labels), train.class_names
    if found.class_names == train.class_names:
        return stores.Store(found.images, found.labels), found.class_names
    if train.class_names == class_folders.ONE_CLASS:
        return stores.Store(found.images, np.zeros_like(found.labels)), train.class_names
    if flat:
        return stores.Store(found.images, None), train.class_names
    if found.numbered or train.numbered:  # one of them has no names of classes
        return stores.Store(found.images, found.labels), max(train.class_names, found.class_names, key=len)
    odd = sorted(set(found.class_names) ^ set(train.class_names))[0]
    raise UserError(
        f"{named.heldout_path}={heldout_path!r} has other classes than {named.path}={path!r}: {odd!r} is in only one; "
        f"add it"
    )


def _may_exist(path):
    return os.path.exists(os.path.expanduser(path)) or any(character in path for character in "{*?[")


class _Tfds:
    """Store of the records of a TFDS data source."""

    labelled = True

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

    def names(self):
        return map(self.name, range(len(self)))

    def captions(self, index):
        return []


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
