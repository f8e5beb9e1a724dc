"""WebDataset's tar files: the members KEY.jpg, KEY.cls, KEY.json and KEY.txt are one image with its label and caption.

Nothing is unpacked: images are read in place.
"""

import contextlib
import tarfile
from typing import NamedTuple

import numpy as np

from rae_jax.data import class_folders, decode, shard_index
from rae_jax.data.names import Names
from rae_jax.errors import UserError, one_line
from rae_jax.runtime import logs

LABELS, CAPTIONS = ("cls", "json.label", "json.cls", "txt"), ("txt", "json.caption", "json.text")  # looked for in turn
_IMAGES = tuple(decode.SUFFIXES)
_LARGEST_TEXT = 2**24  # bytes of a label or a JSON file
_DAMAGED = (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, LookupError, TypeError, MemoryError)


def index(files, fields, named):
    """Return the Index of the images in tar files. `fields`: {'label', 'caption'}: EXTENSION, json.KEY or '' (found).

    Labels are those of the field 'label', by default the first of LABELS that the first image has; without labels all
    images are one class, which is said. Raises UserError for a file that is not a whole tar file, and for an image
    without a label. `named`: see sources.Settings.
    """
    images = _Images(fields["label"], fields["caption"], named.field.format("label"))
    with logs.Progress("index", total=len(files), unit="shard") as progress:
        for number, file in enumerate(files):
            with _reading(file), open(file, "rb") as data:
                for key, members in _samples(file):
                    images.add(_Sample(f"{file}:{one_line(key)}", data, members), number, key)
            progress.update(number + 1)
    return images.index()


def _samples(file):
    """Yield (key, {extension: (offset, length)}) of the samples of a tar file, in order."""
    last, members = None, {}
    for name, offset, length in _members(file):
        folder, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        key = f"{folder}{slash}{stem}"
        if key != last and members:
            yield last, members
            members = {}
        last = key
        members[extension.lower()] = (offset, length)
    if members:
        yield last, members


def _members(file):
    """Yield (name, offset, length) of the files in a tar file, without hidden ones."""
    place = -1
    with tarfile.open(file, "r:") as archive:
        while (member := archive.next()) is not None:
            if member.offset <= place:
                raise tarfile.TarError("its members are not in order")
            place = member.offset
            archive.members.clear()  # it keeps all
            if not member.isreg() or member.issparse():
                continue
            if member.size < 0:
                raise tarfile.TarError(f"{member.name!r} has a negative size")
            name = member.name.removeprefix("./")
            if not any(map(class_folders.is_hidden, name.split("/"))):
                yield name, member.offset_data, member.size
        archive.fileobj.seek(archive.offset)
        if any(archive.fileobj.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
            raise tarfile.TarError(f"it is damaged at byte {archive.offset}")


@contextlib.contextmanager
def _reading(file):
    try:
        yield
    except _DAMAGED as error:
        raise UserError(
            f"{file} is not a whole tar file ({one_line(error, longest=120)}): fetch it again, or leave it out"
        ) from error


class _Sample(NamedTuple):
    """The members of a sample in an open tar file."""

    name: str  # for messages
    file: object
    members: dict  # {extension: (offset, length)}

    def image(self):
        """Return the (offset, length) of the image, or None; of KEY.jpg before those of KEY.OTHER.jpg."""
        images = {name: found for name, found in self.members.items() if f".{name}".endswith(_IMAGES)}
        return images[min(images, key=lambda name: name.count("."))] if images else None

    def value(self, field):
        """Return the value of a field: a text, or a value in JSON; None if the sample does not have it."""
        extension, dot, key = field.partition(".")
        if extension not in self.members:
            return None
        offset, length = self.members[extension]
        if length > _LARGEST_TEXT:
            raise UserError(f"{self.name}.{extension} has {length} bytes, and is no text: remove it")
        self.file.seek(offset)
        text = self.file.read(length).decode("utf-8-sig", "replace")
        if not dot:
            return text.strip()
        try:
            return shard_index.json_value(text, key)
        except ValueError as error:
            raise UserError(f"{self.name}.json is not a JSON object ({one_line(error)}): repair it") from error


class _Images:
    """Collects the images of samples. `key`: the name of the setting for the field of labels, for messages."""

    def __init__(self, label, caption, key):
        self._label, self._caption, self._key = label, caption, key
        self._places, self._labels, self._names, self._left_out = [], [], [], 0

    def add(self, sample, number, key):
        """Add a sample of the file with a number, if it has an image."""
        if sample.image() is None:
            if "cls" in sample.members:
                raise UserError(
                    f"{sample.name} has a label and no image: sort the members of a tar file by their names"
                )
            self._left_out += 1
            return
        if not self._names:
            self._choose_fields(sample)
        if self._label:
            self._labels.append(self._checked(sample.value(self._label), sample.name))
        elif "cls" in sample.members:
            raise UserError(f"{sample.name} has a label, and the first image has none: add it, or set {self._key}")
        caption = sample.members.get(self._caption.partition(".")[0], (0, 0))
        self._places.append((number, *sample.image(), *caption))
        self._names.append(key)

    def index(self):
        """Return the Index of the images."""
        if self._left_out:
            logs.say(f"index: samples without an image are left out ({self._left_out} in all)")
        if self._names and not self._label:
            logs.say(
                f"index: the images have no labels (.cls, .json) and are one class; {self._key} names other fields"
            )
        places = np.array(self._places, np.int64).reshape(-1, 5).T
        labels, class_names = shard_index.classes_of(self._labels, len(self._names))
        return shard_index.Index(
            places[0].astype(np.int32), *places[1:], labels, Names(self._names), class_names, self._caption
        )

    def _choose_fields(self, sample):
        """Choose the fields that are not named, by the first image."""

        def has(field):
            value = sample.value(field)
            return value is not None and (field != "txt" or value.isdecimal())

        self._label = self._label or next(filter(has, LABELS), "")
        captions = (field for field in CAPTIONS if field != self._label and sample.value(field) is not None)
        self._caption = self._caption or next(captions, "")

    def _checked(self, label, name):
        if isinstance(label, bool) or not isinstance(label, int | float | str) or label == "":
            raise UserError(
                f"{name} has no label in the field {self._label!r}: add it, or name another field by {self._key}"
            )
        return label
