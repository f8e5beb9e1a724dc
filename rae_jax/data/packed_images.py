"""The packed form: images cropped or resized once, encoded again, in ArrayRecord shards.

A folder holds SPLIT-NNNNN-of-NNNNN.array_record and index.json: 'image_size', 'crop', 'class_names', and for each of
the splits 'train' and 'heldout' a list of {'file', 'num_images', 'skipped'}. A record is the label (int32; -1: unknown)
and the length of the key (uint32), both little-endian, the key (UTF-8) and the encoded image. The key of an image with
captions is followed by a zero byte and the captions, a JSON list.
"""

import bisect
import functools
import itertools
import json
import os
import struct
import threading
from pathlib import Path

import numpy as np

from rae_jax.data import decode
from rae_jax.errors import UserError
from rae_jax.runtime import logs

INDEX = "index.json"
_HEAD = struct.Struct("<iI")


UNLABELLED = -1


def record(label, key, image, captions=()):
    """Return the bytes of a record."""
    key = (f"{key}\0{json.dumps(captions)}" if captions else key).encode(errors="surrogateescape")
    return _HEAD.pack(label, len(key)) + key + image


def parse(data):
    """Return (label, key, encoded image) of the bytes of a record. Raises ValueError if they are no record."""
    label, key, image = _split(data)
    return label, key.partition("\0")[0], image


def captions_of(data):
    """Return the captions, a list of strings, of the bytes of a record. Raises ValueError if they are no record."""
    captions = _split(data)[1].partition("\0")[2]
    return json.loads(captions) if captions else []


def _split(data):
    if len(data) < _HEAD.size:
        raise ValueError("it is too short")
    label, length = _HEAD.unpack_from(data)
    body = data[_HEAD.size :]
    if len(body) <= length:
        raise ValueError("it is too short")
    return label, body[:length].decode(errors="surrogateescape"), body[length:]


class PackedImages:
    """Random-access source of {'image': uint8 [size, size, 3], 'label': int32} from a packed split.

    Examples have no 'label' if `labelled` is False. Training images are packed for one `crop`, 'centre' or 'random';
    None accepts both, if they are not trained on. Raises UserError if the images were packed for another size or crop,
    and for missing shards. With `on_error`='skip' missing shards are reported instead, and their images are left out.
    """

    def __init__(self, *, path, split, image_size, crop=None, on_error="stop"):
        folder = Path(os.path.expanduser(path))
        index = read_index(folder, f"config.data.path={path!r}", "rae_jax.data.pack")
        self.class_names = tuple(index["class_names"])
        self._size = image_size
        packed_for = index["crop"] if split == "train" else "centre"
        if index["image_size"] != image_size:
            size = index["image_size"]
            raise UserError(f"{path} was packed for config.data.image_size={size}, not {image_size}: pack it again")
        if crop not in (None, packed_for):
            raise UserError(
                f"{path} was packed for crop={packed_for!r}, but this stage needs crop={crop!r}: "
                f"pack it again with --crop={crop}, into another folder"
            )
        shards = [shard for shard in index["splits"][split] if shard_exists(folder / shard["file"], shard, on_error)]
        if not sum(shard["num_images"] for shard in shards):
            raise UserError(f"config.data.path={path!r} holds no images of the split {split}: pack it again")
        self._shards = [(shard["file"], shard["num_images"]) for shard in index["splits"][split]]
        self._records = Records([str(folder / s["file"]) for s in shards], [s["num_images"] for s in shards])
        self.labelled = split not in index.get("unlabelled", ())

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        return self._example(index, decode.pixels, (self._size, self._size))

    def random_crop(self, index, rng):
        """Return self[index] with a random crop, from images packed for random crops."""
        return self._example(index, lambda image: decode.random_square(image, self._size, rng))

    def image_names(self):
        """Return the names and sizes of the shards: only reading all records tells the names of the images."""
        return self._shards

    def captions(self, index):
        """Return the captions of image `index`, a list of strings."""
        with decode.naming(self._records.name(index)):
            return captions_of(self._records[index])

    def _example(self, index, crop, sides=None):
        name = self._records.name(index)
        with decode.naming(name):
            label, key, data = parse(self._records[index])
        name = f"{name} ({key})"
        if self.labelled and not 0 <= label < len(self.class_names):
            raise UserError(f"{name} has label {label}, outside of 0 to {len(self.class_names) - 1}: pack it again")
        image = decode.decode(data, name, lambda image: crop(_of_size(image, sides)))
        return {"image": image, "label": np.int32(label)} if self.labelled else {"image": image}


class Records:
    """Random access to the records of ArrayRecord `files` with `counts` records each; files are opened when needed."""

    def __init__(self, files, counts):
        self._files, self._ends = files, list(itertools.accumulate(counts))

    def __len__(self):
        return self._ends[-1]

    def __getitem__(self, index):
        shard, row = self._place(index)
        try:
            return self._reader(shard).read([row])[0]
        except (RuntimeError, IndexError) as error:  # ArrayRecord's errors for damaged files
            raise ValueError(str(error)) from error

    def name(self, index):
        """Return the shard and the row of a record, for messages."""
        shard, row = self._place(index)
        return f"{self._files[shard]}, record {row}"

    def _place(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        return shard, int(index) - (self._ends[shard - 1] if shard else 0)

    def _reader(self, shard):
        with self._opened[1]:
            readers = self._opened[0]
            if shard not in readers:
                readers[shard] = open_shard(self._files[shard])
            return readers[shard]

    @functools.cached_property  # not pickled: each worker opens the files itself
    def _opened(self):
        return {}, threading.Lock()

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_opened"}


def open_shard(file):
    """Return a reader of single records, which is thread-safe. Raises ValueError if the file is not a whole shard."""
    try:
        from array_record.python.array_record_module import ArrayRecordReader  # late, as grain in pipeline

        return ArrayRecordReader(str(file), options="readahead_buffer_size:0", file_reader_buffer_size=2**15)
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def read_index(folder, given, command):
    """Read the index that `command` wrote to a folder. `given`: the key or flag that names the folder, for messages."""
    try:
        return json.loads((folder / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{given} has no {INDEX}: name a folder that `python -m {command}` has finished") from error


def shard_exists(file, shard, on_error):
    """Return True if a shard exists; otherwise report it and return False, or raise UserError, by `on_error`."""
    if file.exists():
        return True
    report = f"the shard {file} with {shard['num_images']} images is missing"
    if on_error == "stop":
        raise UserError(f"{report}: restore it, or pack again")
    logs.say(f"skipped: {report}", everywhere=True)
    return False


def _of_size(image, sides):
    if sides is not None and image.size != sides:
        raise ValueError(f"it has {image.width}x{image.height} pixels, not {sides[0]}x{sides[1]}")
    return image
