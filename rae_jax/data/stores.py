"""Stores of encoded images: len(store), store.read(index) -> (bytes, label), store.name(index) for messages.

`Store` adds labels to images and chooses some of them. The classes `Files`, `Entries`, shard_index.Spans and
parquet_files.Rows know where the images are: read(row) -> bytes, names(rows) for messages, and inner_names(rows), which
do not depend on the place of the data. All are small when they are pickled, and hold no open files: each worker process
opens what it reads.
"""

import functools
import zipfile

import numpy as np

LARGEST_IMAGE = 2**28  # bytes of an encoded image, unpacked if it is in an archive: no image is larger


class Store:
    """Images with `labels`, int32 [N]; None: unknown. `rows`: the numbers of the images that are chosen, in order."""

    def __init__(self, images, labels, rows=None):
        self._images, self._labels = images, labels
        self._rows = np.arange(len(images), dtype=np.int32) if rows is None else rows

    def __len__(self):
        return len(self._rows)

    @property
    def labelled(self):
        """True if the labels are known."""
        return self._labels is not None

    def read(self, index):
        """Return (encoded image, label) of image `index`; the label is None if it is unknown."""
        row = int(self._rows[index])
        return self._images.read(row), int(self._labels[row]) if self.labelled else None

    def name(self, index):
        """Return the name of image `index`, for messages: its path, or its place in an archive."""
        return self._images.names(self._rows[[index]])[0]

    def names(self):
        """Yield the names of all images."""
        for rows in self._blocks():
            yield from self._images.names(rows)

    def image_names(self):
        """Yield (name, label) of each image; the name does not depend on the place of the data."""
        for rows in self._blocks():
            labels = self._labels[rows].tolist() if self.labelled else [None] * len(rows)
            yield from zip(self._images.inner_names(rows), labels, strict=True)

    def _blocks(self):
        return (self._rows[first : first + 2**16] for first in range(0, len(self._rows), 2**16))

    def captions(self, index):
        """Return the captions of image `index`, a list of strings."""
        return self._images.captions(int(self._rows[index])) if hasattr(self._images, "captions") else []

    def subset(self, indices):
        """Return the store of the images with these indices."""
        return Store(self._images, self._labels, self._rows[indices])


class Files:
    """Image files. `names`: their names relative to a folder, or absolute names of files elsewhere."""

    def __init__(self, folder, names):
        self._folder, self._names = str(folder), names

    def __len__(self):
        return len(self._names)

    def read(self, row):
        """Return the bytes of a file."""
        with open(self.names([row])[0], "rb") as file:
            return file.read()

    def names(self, rows):
        """Return the paths of some files."""
        names = self._names.take(rows)
        if self._folder == ".":
            return names
        return [name if name[:1] == "/" else f"{self._folder}/{name}" for name in names]

    def inner_names(self, rows):
        """Return the paths of some files without the folder."""
        return [name.removeprefix(self._folder) for name in self.names(rows)]


class Entries:
    """Entries of a zip archive; they are read in place and never unpacked to disk."""

    def __init__(self, path, names):
        self._path, self._names = str(path), names

    def __len__(self):
        return len(self._names)

    def read(self, row):
        """Return the unpacked bytes of an entry. Raises ValueError for an entry that is larger than any image."""
        entry = self._names[row]
        size = self._archive.getinfo(entry).file_size  # at most this size is unpacked
        if size > LARGEST_IMAGE:
            raise ValueError(f"its unpacked size is {size} bytes, more than {LARGEST_IMAGE}")
        return self._archive.read(entry)

    def names(self, rows):
        """Return the archive and the entry of some images."""
        return [f"{self._path}:{name}" for name in self.inner_names(rows)]

    def inner_names(self, rows):
        """Return the names of some entries."""
        return self._names.take(rows)

    @functools.cached_property
    def _archive(self):
        return zipfile.ZipFile(self._path)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_archive"}
