"""The images at a path: a folder, a .zip archive or a list. A path is listed again only after it has changed."""

import errno
import functools
import os
import time
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from rae_jax.data import class_folders, decode, label_files
from rae_jax.data.names import Names
from rae_jax.data.stores import Entries, Files
from rae_jax.errors import UserError
from rae_jax.runtime import atomic_files, logs

LOOK_SECONDS = 0.5  # for a look at whether the files of a list exist
OTHER_SOURCES = {".tar": "webdataset", ".parquet": "parquet", ".array_record": "array_record"}


class Found(NamedTuple):
    """The images that a path holds."""

    images: object  # see stores
    labels: np.ndarray  # int32 [N]
    class_names: tuple
    numbered: bool = False  # the names of the classes are only numbers


def images_at(given, key, named, *, num_classes, on_error):
    """Return the Found of all images at a path.

    `key` names the path in messages, `named` all settings (see sources.Settings). Raises UserError for a path
    that holds no images as they are needed. A list that names files that do not exist is an error with
    `on_error`='stop', and otherwise reported.
    """
    path, value = Path(os.path.expanduser(given)), f"{key}={given!r}"
    if given and path.is_dir():
        return _in_folder(path, value, named)
    if given and path.is_file():
        try:
            if zipfile.is_zipfile(path):
                return _in_zip(path, value, named, num_classes == 1, _changed(path))
            return _in_list(path, value, num_classes, on_error, _changed(path))
        except OSError as error:
            raise UserError(f"{value} cannot be read ({atomic_files.reason(error)}): correct its rights") from error
    raise UserError(
        f"{value} does not exist: name a folder with one subfolder of images per class, a .zip archive of such "
        f"a folder, or a list of images"
    )


def no_images(value, suffixes=(), fix="put more into one subfolder per class, or all in one folder"):
    """Return the UserError about a path without images. `suffixes`: the suffixes of the files that it holds."""
    return UserError(f"{value} holds no images: {other_source(suffixes) or fix}")


def other_source(suffixes):
    """Return the words that name the source for files with some of these suffixes; None if no source has them."""
    found = [(suffix, source) for suffix, source in OTHER_SOURCES.items() if suffix in suffixes]
    return f"for its {found[0][0]} files set source={found[0][1]!r}" if found else None


def _changed(path):
    """Return the time of the last change of a file, and its size."""
    found = os.stat(path)
    return found.st_mtime_ns, found.st_size


class Tree:
    """The files with some suffixes in a folder and in all folders inside, without hidden ones; links are followed.

    `names` and `folders` (at the top) are relative to the folder, in order; `suffixes` are those of all files. Raises
    UserError for a folder that cannot be listed.
    """

    def __init__(self, folder, wanted):
        self.names, self.folders, self.suffixes = [], [], set()
        self._wanted, self._times = wanted, {}
        try:
            self._list(str(folder), "", ())
        except OSError as error:
            reason = atomic_files.reason(error)
            raise UserError(f"cannot list {error.filename} ({reason}): correct its rights") from error

    def is_current(self):
        """Return whether no folder has changed."""
        try:
            return all(os.stat(folder).st_mtime_ns == time for folder, time in self._times.items())
        except OSError:
            return False

    def _list(self, folder, prefix, parents):
        found = os.stat(folder)
        self._times[folder] = found.st_mtime_ns
        parents = (*parents, (found.st_dev, found.st_ino))
        with os.scandir(folder) as entries:
            shown = (entry for entry in entries if not class_folders.is_hidden(entry.name))
            entries = sorted(shown, key=lambda entry: entry.name)
        for entry in entries:
            if _is_folder(entry):
                inside = entry.stat()
                if (inside.st_dev, inside.st_ino) not in parents:  # a link to a folder around it has no end
                    if not prefix:
                        self.folders.append(entry.name)
                    self._list(entry.path, f"{prefix}{entry.name}/", parents)
            else:
                suffix = os.path.splitext(entry.name)[1].lower()
                self.suffixes.add(suffix)
                if suffix in self._wanted:
                    self.names.append(prefix + entry.name)


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return False
        raise


_trees = {}  # {folder: (Tree, Found)} of the two folders that were listed last


def _in_folder(folder, value, named):
    if folder not in _trees or not _trees[folder][0].is_current():
        if len(_trees) > 1:
            _trees.pop(next(iter(_trees)))
        tree = Tree(folder, decode.SUFFIXES)
        class_folders.refuse_splits_of_tree(
            tree.names,
            value,
            lambda train, other: f"set {named.path}={folder / train} and {named.heldout_path}={folder / other}",
        )
        if not tree.names:
            raise no_images(value, tree.suffixes)
        names, labels, class_names = class_folders.arrange(tree.names, tree.folders, value)
        tree.names = []
        _trees[folder] = tree, Found(Files(folder, Names(names)), labels, class_names)
    return _trees[folder][1]


@functools.lru_cache(maxsize=2)
def _in_list(path, value, num_classes, on_error, changed):
    try:
        names, labels = label_files.read_list(path, num_classes)
    except ValueError as error:
        fix = other_source([path.suffix.lower()]) or "name a folder, a .zip archive or a list"
        raise UserError(f"{value} is neither a folder, a .zip archive nor a text file: {fix}") from error
    if not names:
        raise no_images(value, fix="put a line `IMAGE LABEL` for each image into it")
    plain = [name if _is_plain(name) else _as_written(path.parent, name) for name in names]
    images = Files(path.parent, Names(plain))
    _look(images, value, on_error)
    count = num_classes or 1 + max(labels)
    return Found(images, np.array(labels, np.int32), tuple(map(str, range(count))), numbered=True)


def _is_plain(name):
    return not name.startswith("./") and "//" not in name and "/./" not in name and "\\" not in name


def _as_written(folder, name):
    """Return a name without needless parts; with '/' for '\\', unless a file has the name as it is written."""
    if "\\" in name and not (folder / name).exists():
        name = name.replace("\\", "/")
    return str(PurePosixPath(name))


def _look(files, value, on_error):
    """Report files that do not exist, in a time that is bounded: all files, or some from all parts of the list."""
    end, looked, missing = time.monotonic() + LOOK_SECONDS, 0, []
    for row in np.random.default_rng(0).permutation(len(files)).tolist():
        looked += 1
        if not os.path.exists(files.names([row])[0]):
            missing.append(row)
        if time.monotonic() > end:
            break
    if missing:
        first = ", ".join(files.names(sorted(missing)[:3]))
        report = f"{value}: {len(missing)} of {looked} files that were looked for do not exist: {first}"
        if on_error == "stop":
            raise UserError(f"{report}; correct the list, or leave them out (on_error=skip)")
        logs.say(report)


@functools.lru_cache(maxsize=2)
def _in_zip(path, value, named, one_class, changed):
    with decode.naming(path), zipfile.ZipFile(path) as archive:
        entries = {info.filename.replace("\\", "/"): info.filename for info in archive.infolist()}
    for name, entry in entries.items():
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise UserError(f"{value} has the entry {entry!r}, which is outside of the archive: remove it")
    shown = sorted(name for name in entries if not any(map(class_folders.is_hidden, PurePosixPath(name).parts)))
    files = [name for name in shown if not name.endswith("/")]
    names = [name for name in files if PurePosixPath(name).suffix.lower() in decode.SUFFIXES]
    if not names:
        raise no_images(value, {PurePosixPath(name).suffix.lower() for name in files})
    outer = "" if one_class else _outer_folder(names)
    names = [name.removeprefix(outer) for name in names]
    fix = f"put each into an archive of its own, for {named.path} and {named.heldout_path}"
    class_folders.refuse_splits_of_tree(names, value, lambda *both: fix)
    names, labels, class_names = class_folders.arrange(names, _empty_folders(shown, files, outer), value)
    return Found(Entries(path, Names([entries[outer + name] for name in names])), labels, class_names)


def _empty_folders(shown, files, outer):
    """Return the names of the folders in the folder `outer` of an archive that hold no file of any kind."""
    inside = {name.removeprefix(outer) for name in shown if name.startswith(outer)} - {""}
    filled = {name.removeprefix(outer).partition("/")[0] for name in files}
    return {name.partition("/")[0] for name in inside if "/" in name} - filled


def _outer_folder(names):
    """Return the folder, ending with '/', that holds all images of an archive in folders of its own; or ''."""
    outer = ""
    while True:
        tops = {name.removeprefix(outer).partition("/")[0] for name in names}
        deep = all("/" in name.removeprefix(outer).partition("/")[2] for name in names)
        if len(tops) > 1 or not deep:
            return outer
        outer += f"{tops.pop()}/"
