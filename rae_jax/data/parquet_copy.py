"""The images of parquet files for reading in random order: copied once to a file of their own, as `datasets` does."""

import contextlib
import fcntl
import functools
import os
import shutil
import threading

import numpy as np

from rae_jax.data import shard_index
from rae_jax.errors import UserError
from rae_jax.runtime import atomic_files, logs

_lock = threading.Lock()  # of the threads of a process; file locks are for processes


def for_random_order(rows, files, fields):
    """Return the images of Rows for reading in random order: from a copy, which is kept; see shard_index.

    Without a folder for it, or on a remote one, the rows themselves are read.
    """
    folder = shard_index.folder_of_copies()
    if folder is None or not len(rows):
        return rows
    path = folder / f"{shard_index.digest(files, fields)}.images"
    return Copied(rows, os.fspath(path), total=sum(os.stat(file).st_size for file in files))


class Copied:
    """The images of Rows, copied to a file when the first image is read, or when this object is pickled; see stores."""

    def __init__(self, rows, path, total):
        self._rows, self._path, self._total = rows, path, total

    def __len__(self):
        return len(self._rows)

    def read(self, row):
        """Return the bytes of an image. Raises ValueError for a row without bytes, UserError if the disk is full."""
        start, end = (int(self._ends[row - 1]) if row else 0), int(self._ends[row])
        with open(self._path, "rb", buffering=0) as file:
            file.seek(start)
            data = file.read(end - start)
        if len(data) < max(end - start, 1):
            raise ValueError("its row holds no bytes of an image")
        return data

    def captions(self, row):
        """Return the captions of an image, a list of strings."""
        return self._rows.captions(row)

    def names(self, rows):
        """Return the file and the row in it, from 0, of some images."""
        return self._rows.names(rows)

    def inner_names(self, rows):
        """Return the names of some images without the place of their files."""
        return self._rows.inner_names(rows)

    @functools.cached_property
    def _ends(self):
        """The end of each image in the copy, int64 [N]; the copy is made if it is not there."""
        with _lock:
            return _copied(self._rows, self._path, self._total)

    def __getstate__(self):
        return {**self.__dict__, "_ends": self._ends}


def _copied(rows, path, total):
    """Return the ends of the images in the copy at a path, after making it if it is not whole."""
    ends = f"{path}.ends.npy"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.lock", "wb") as lock:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be making the copy; ends with a process
            found = _whole(path, ends)
            return _copy(rows, path, ends, total) if found is None else found
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({atomic_files.reason(error)}): make room, or pack the data "
            f"(rae_jax.data.pack --source=parquet)"
        ) from error


def _whole(path, ends):
    """Return the ends of the images of a copy; None if it is missing or not whole."""
    try:
        found = np.load(ends, allow_pickle=False)
        return found if len(found) and os.path.getsize(path) == found[-1] else None
    except (OSError, ValueError, EOFError):
        return None


def _copy(rows, path, ends, total):
    unfinished, lengths = f"{path}.unfinished", np.zeros(len(rows), np.int64)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(unfinished)  # of a process that was killed
    free = shutil.disk_usage(os.path.dirname(path)).free
    if free < total:
        raise UserError(
            f"{os.path.dirname(path)} has {free >> 20} MiB left, and a copy of the images of the parquet files takes "
            f"{total >> 20}: make room, or pack them (rae_jax.data.pack --source=parquet)"
        )
    logs.say(f"copying the images of the parquet files to {path}, once")
    try:
        with open(unfinished, "wb") as file, logs.Progress("copy", total=len(rows), unit="image") as progress:
            for row, data in enumerate(rows.images()):
                lengths[row] = file.write(data or b"")  # a missing image is reported when it is read
                progress.update(row + 1)
        os.replace(unfinished, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise
    with open(f"{ends}.unfinished", "wb") as file:
        np.save(file, np.cumsum(lengths))
    os.replace(file.name, ends)  # last: it makes the copy count
    return np.cumsum(lengths)
