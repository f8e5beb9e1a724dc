"""Parquet files as `datasets` exports them: a column of images ({bytes, path} or bytes), of labels, and of captions.

Needs pyarrow. Parquet decodes whole row groups, which is fast in order and slow in random order: see parquet_copy.
"""

import contextlib
import functools
import json
import os
import threading
from typing import NamedTuple

import numpy as np

from rae_jax.data import shard_index
from rae_jax.data.stores import LARGEST_IMAGE
from rae_jax.errors import UserError, one_line
from rae_jax.runtime import logs

# Names of columns that are looked for in turn.
IMAGES, LABELS, CAPTIONS = ("image", "img", "jpg", "png"), ("label", "labels", "cls"), ("caption", "text", "txt")
_ROWS_COPIED = 64  # images in memory while they are copied


class Columns(NamedTuple):
    """Columns of parquet files, by name."""

    image: str
    is_struct: bool  # {bytes, path}, not bytes
    label: str  # '': none
    class_names: tuple  # () if the files do not tell
    caption: str  # '': none

    @property
    def path(self):
        """The part of the column of images that is read."""
        return f"{self.image}.bytes" if self.is_struct else self.image


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

    def images(self):
        """Yield (bytes or None) of all images in order, without decoding whole row groups."""
        for file in self._files:
            with _reading(file), _open(file) as opened:
                for batch in opened.iter_batches(batch_size=_ROWS_COPIED, columns=[self._columns.path]):
                    for value in batch.column(0):
                        value = value.as_py()
                        yield value["bytes"] if self._columns.is_struct and value is not None else value

    def _decoded(self, group):
        """Return the columns of a row group; the last two row groups are kept."""
        with self._kept[1]:
            kept = self._kept[0]
            if group not in kept:
                file, number = self._groups[group]
                names = [name for name in (self._columns.path, self._columns.caption) if name]
                with _reading(self._files[file], ValueError), _open(self._files[file]) as opened:
                    table = opened.read_row_group(number, columns=names)
                if len(kept) > 1:
                    kept.pop(next(iter(kept)))
                kept[group] = [table[name] for name in (self._columns.image, self._columns.caption) if name]
            return kept[group]

    @functools.cached_property
    def _kept(self):
        return {}, threading.Lock()

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_kept"}


def rows_of(files, fields, named):
    """Return (Rows, labels int32, class names) of files. `fields`: {'image', 'label', 'caption'}: columns, '' (found).

    The class names are () if labels are numbers without names. Without a column of labels, which is said, all images
    are one class. Raises UserError for files that cannot be read or do not have the same columns, and for columns that
    do not exist. `named`: see sources.Settings.
    """
    name = shard_index.digest(files, [fields, "rows"])
    if name not in _rows:
        if len(_rows) > 3:
            _rows.pop(next(iter(_rows)))
        _rows[name] = _rows_of(tuple(files), fields, named)
    return _rows[name]


_rows = {}  # {digest: result of rows_of} of the files that were opened last


def _rows_of(files, fields, named):
    columns, counts, labels = None, [], []
    for file in files:
        with _reading(file), _open(file) as opened:
            found = _columns(opened.schema_arrow, fields, file, named.field)
            columns = columns or found
            if found != columns:
                raise UserError(f"{file} has other columns than {files[0]}: {found} and not {columns}: leave it out")
            metadata = opened.metadata
            counts.append([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)])
            if columns.label:
                labels += opened.read(columns=[columns.label])[columns.label].to_pylist()
    rows, key = Rows(files, columns, counts), named.field.format("label")
    missing = next((row for row, label in enumerate(labels) if label is None), None)
    if missing is not None:
        raise UserError(f"{rows.names([missing])[0]} has no {columns.label!r}: add it, or set {key}")
    if not columns.label and len(rows):
        logs.say(f"{files[0]}: no column of labels is found, and all images are one class; {key} names another column")
    labels, class_names = shard_index.classes_of(labels, len(rows))
    return rows, labels, class_names or columns.class_names


def _columns(schema, fields, file, key):
    """Return the Columns of a schema: the named ones, otherwise the first of the usual names."""
    import pyarrow.types as types

    def choose(kind, usual, suits):
        suited = [field.name for field in schema if suits(field.type)]
        if fields[kind] and fields[kind] not in suited:
            raise UserError(
                f"{key.format(kind)}={fields[kind]!r} is no column of {file} that can be a {kind}: choose from "
                f"{', '.join(suited) or 'another file'}"
            )
        return fields[kind] or next((name for name in usual if name in suited), "")

    def is_binary(kind):
        return types.is_binary(kind) or types.is_large_binary(kind)

    def is_image(kind):
        return is_binary(kind) or (types.is_struct(kind) and kind.get_field_index("bytes") >= 0)

    def is_text(kind):
        return types.is_string(kind) or types.is_large_string(kind)

    def is_label(kind):
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return types.is_integer(kind) or types.is_boolean(kind) or is_text(kind)

    image = choose("image", [*IMAGES, *(field.name for field in schema)], is_image)
    if not image:
        raise UserError(f"{file} has no column of images ({{bytes, path}} or bytes): its columns are {schema.names}")
    label = choose("label", LABELS, is_label)
    unsuited = [name for name in LABELS if name in schema.names] if not label else []
    if unsuited:
        kind = schema.field(unsuited[0]).type
        raise UserError(f"{file}: the column {unsuited[0]!r} of {kind} holds no labels: set {key.format('label')}")
    caption = choose("caption", CAPTIONS, lambda kind: is_text(kind) or _is_list(kind, is_text))
    is_struct = types.is_struct(schema.field(image).type)
    return Columns(image, is_struct, label, _class_names(schema, label), "" if caption == label else caption)


def _is_list(kind, of):
    import pyarrow.types as types

    return (types.is_list(kind) or types.is_large_list(kind)) and of(kind.value_type)


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
def _reading(file, kind=UserError):
    """Turn errors of pyarrow into an error, by default a UserError, that names the file."""
    try:
        import pyarrow
    except ImportError as error:
        raise UserError("config.data.source='parquet' needs pyarrow: pip install -e '.[parquet]'") from error
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:
        reason = one_line(error, longest=200)
        raise kind(f"{file} is not a whole parquet file ({reason}): fetch it again, or leave it out") from error
