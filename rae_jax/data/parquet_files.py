"""Parquet files as `datasets` exports them: a column of images ({bytes, path} or bytes), of labels, and of captions.

Needs pyarrow. Parquet decodes whole row groups, which is fast in order and slow in random order. For random order the
images are copied once to a file of their own, as `datasets` does.
"""

import contextlib
import functools
import json
import os
import shutil
import threading
from typing import NamedTuple

import jax
import numpy as np

from rae_jax.data import shard_index
from rae_jax.data.stores import LARGEST_IMAGE
from rae_jax.errors import UserError, one_line
from rae_jax.runtime import atomic_files, logs

# Names of columns that are looked for in turn.
IMAGES, LABELS, CAPTIONS = ("image", "img", "jpg", "png"), ("label", "labels", "cls"), ("caption", "text", "txt")


class Columns(NamedTuple):
    """Columns of parquet files, by name."""

    image: str
    is_struct: bool  # {bytes, path}, not bytes
    label: str  # '': none
    class_names: tuple  # () if the files do not tell
    caption: str  # '': none


class Rows:
    """Images in the rows of parquet files; see stores. A read decodes the row group that holds the image."""

    def __init__(self, files, columns, counts):
        self._files, self._columns = files, columns
        self._groups = [(file, group) for file, sizes in enumerate(counts) for group in range(len(sizes))]
        self._ends = np.cumsum([size for sizes in counts for size in sizes], dtype=np.int64)
        self._firsts = np.cumsum([0, *map(sum, counts)], dtype=np.int64)  # first row of each file

    def __len__(self):
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, row):
        """Return the bytes of an image. Raises ValueError for a row without bytes, and for a damaged file."""
        value = self._value(row, 0)
        value = value["bytes"] if self._columns.is_struct and value is not None else value
        if not value:
            raise ValueError("its row holds no bytes of an image")
        if len(value) > LARGEST_IMAGE:
            raise ValueError(f"its size is {len(value)} bytes, more than {LARGEST_IMAGE}")
        return value

    def captions(self, row):
        """Return the captions of an image, a list of strings."""
        found = self._value(row, 1) if self._columns.caption else None
        found = [found] if isinstance(found, str) else found or []
        return [str(caption) for caption in found if caption]

    def names(self, rows):
        """Return the file and the row in it, from 0, of some images."""
        files = np.searchsorted(self._firsts, rows, "right") - 1
        inside = np.asarray(rows) - self._firsts[files]
        return [f"{self._files[file]}:row {row}" for file, row in zip(files.tolist(), inside.tolist(), strict=True)]

    def inner_names(self, rows):
        """Return the names of some images without the place of their files."""
        return list(map(os.path.basename, self.names(rows)))

    def _value(self, row, column):
        group = int(np.searchsorted(self._ends, row, "right"))
        first = int(self._ends[group - 1]) if group else 0
        return self._decoded(group)[column][row - first].as_py()

    def _decoded(self, group):
        """Return the columns of a row group; the last two row groups are kept."""
        with self._kept[1]:
            kept = self._kept[0]
            if group not in kept:
                file, number = self._groups[group]
                names = [self._columns.image + ".bytes" * self._columns.is_struct]
                names += [self._columns.caption] if self._columns.caption else []
                with _reading(self._files[file], ValueError), _open(self._files[file]) as opened:
                    table = opened.read_row_group(number, columns=names)
                if len(kept) > 1:
                    kept.pop(next(iter(kept)))
                kept[group] = [table[name.removesuffix(".bytes")] for name in names]
            return kept[group]

    @functools.cached_property
    def _kept(self):
        return {}, threading.Lock()

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_kept"}


class Copied:
    """The images of Rows, copied to one file; see stores."""

    def __init__(self, rows, path, ends):
        self._rows, self._path, self._ends = rows, path, ends
        self.captions, self.names, self.inner_names = rows.captions, rows.names, rows.inner_names

    def __len__(self):
        return len(self._rows)

    def read(self, row):
        """Return the bytes of an image. Raises ValueError for a row without bytes."""
        start, end = (int(self._ends[row - 1]) if row else 0), int(self._ends[row])
        with open(self._path, "rb", buffering=0) as file:
            file.seek(start)
            data = file.read(end - start)
        if len(data) < max(end - start, 1):
            raise ValueError(f"its row holds no bytes of an image, or {self._path} is damaged: remove this file")
        return data


def rows_of(files, fields):
    """Return (Rows, labels int32, class names) of files. `fields`: {'image', 'label', 'caption'}: columns, '' (found).

    The class names are () if labels are numbers without names. Raises UserError for files that cannot be read, and for
    columns that do not exist.
    """
    columns, counts, labels = None, [], []
    for file in files:
        with _reading(file, UserError), _open(file) as opened:
            columns = columns or _columns(opened.schema_arrow, fields, file)
            metadata = opened.metadata
            counts.append([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
            if columns.label:
                labels += opened.read(columns=[columns.label])[columns.label].to_pylist()
    rows = Rows(files, columns, counts)
    missing = next((row for row, label in enumerate(labels) if label is None), None)
    if missing is not None:
        raise UserError(f"{rows.names([missing])[0]} has no {columns.label!r}: add it, or set config.data.fields.label")
    labels, class_names = shard_index.classes_of(labels, len(rows))
    return rows, labels, class_names or columns.class_names


def copied(rows, files, fields):
    """Return the images of Rows for reading in random order: from a copy, which is made once and kept; see shard_index.

    Without a folder for it, or on a remote one, the rows themselves are read. Raises UserError if the disk is full.
    """
    folder = shard_index.folder_of_copies()
    if folder is None or not len(rows):
        return rows
    name = shard_index.digest(files, fields)
    path, ends = folder / f"{name}.images", folder / f"{name}.ends.npy"
    if not (path.exists() and ends.exists()):
        _copy(rows, path, ends, total=sum(os.stat(file).st_size for file in files))
    return Copied(rows, str(path), np.load(ends))


def _copy(rows, path, ends, total):
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < total:
        raise UserError(
            f"{path.parent} has {free >> 20} MiB left, and a copy of the images of the parquet files takes "
            f"{total >> 20}: make room, or pack them (rae_jax.data.pack --source=parquet)"
        )
    logs.say(f"copying the images of the parquet files to {path}, once")
    unfinished, lengths = f"{path}.unfinished{jax.process_index()}", np.zeros(len(rows), np.int64)
    try:
        with open(unfinished, "wb") as file, logs.Progress("copy", total=len(rows), unit="image") as progress:
            for row in range(len(rows)):
                with contextlib.suppress(ValueError):  # reported by the policy of callers when the image is read
                    lengths[row] = file.write(rows.read(row))
                progress.update(row + 1)
        with open(f"{ends}.unfinished{jax.process_index()}", "wb") as file:
            np.save(file, np.cumsum(lengths))
        os.replace(file.name, ends)
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({atomic_files.reason(error)}): make room, or pack the data"
        ) from error


def _columns(schema, fields, file):
    """Return the Columns of a schema: the named ones, otherwise the first of the usual names."""
    import pyarrow.types as types

    def choose(kind, usual, suits):
        suited = [field.name for field in schema if suits(field.type)]
        if fields[kind] and fields[kind] not in suited:
            raise UserError(
                f"config.data.fields.{kind}={fields[kind]!r} is no column of {file} that can be a {kind}: choose from "
                f"{', '.join(suited) or 'another file'}"
            )
        return fields[kind] or next((name for name in usual if name in suited), "")

    def is_binary(kind):
        return types.is_binary(kind) or types.is_large_binary(kind)

    def is_image(kind):
        return is_binary(kind) or (types.is_struct(kind) and kind.get_field_index("bytes") >= 0)

    def is_text(kind):
        return types.is_string(kind) or types.is_large_string(kind)

    image = choose("image", [*IMAGES, *(field.name for field in schema)], is_image)
    if not image:
        raise UserError(f"{file} has no column of images ({{bytes, path}} or bytes): its columns are {schema.names}")
    label = choose("label", LABELS, lambda kind: types.is_integer(kind) or is_text(kind))
    caption = choose(
        "caption", CAPTIONS, lambda kind: is_text(kind) or (types.is_list(kind) and is_text(kind.value_type))
    )
    is_struct = types.is_struct(schema.field(image).type)
    return Columns(image, is_struct, label, _class_names(schema, label), "" if caption == label else caption)


def _class_names(schema, label):
    """Return the names that `datasets` stores for the numbers of a column of labels; () without them."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()


@contextlib.contextmanager
def _open(file):
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as opened:
        yield opened


@contextlib.contextmanager
def _reading(file, kind):
    """Turn errors of pyarrow into an error of a kind that names the file."""
    try:
        import pyarrow
    except ImportError as error:
        raise UserError("config.data.source='parquet' needs pyarrow: pip install -e '.[parquet]'") from error
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:
        reason = one_line(error, longest=200)
        raise kind(f"{file} is not a whole parquet file ({reason}): fetch it again, or leave it out") from error
