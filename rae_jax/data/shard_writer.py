"""Shards of records, written so that one that counts is whole, and long work goes on where it was interrupted."""

import contextlib
import hashlib
import json

from array_record.python.array_record_module import ArrayRecordWriter

from rae_jax.data import packed_images
from rae_jax.errors import UserError
from rae_jax.runtime import atomic_files

_REQUEST = "request.json"


def claim(output, request):
    """Make the folder `output` for a request (a dict), or go on with the same one.

    Raises UserError where anything else lies there, which is left alone, and where it cannot be written.
    """
    path = output / _REQUEST
    try:
        output.mkdir(parents=True, exist_ok=True)
        if path.exists() and _read(path) != json.loads(json.dumps(request)):
            raise UserError(f"--output={output} holds something else, or in another form: choose another folder")
        begun = {path, atomic_files.unfinished_of(path)}  # by one that was killed before it could say more
        if not path.exists() and set(output.iterdir()) - begun:
            raise UserError(f"--output={output} is not empty: choose another folder")
        atomic_files.write_text(path, json.dumps(request))
    except OSError as error:
        raise UserError(f"cannot write to --output={output} ({error.strerror}): choose another folder") from error


def _read(path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged: remove its folder, or choose another --output") from error


def name(split, number, count):
    """The file of a shard."""
    return f"{split}-{number:05d}-of-{count:05d}.array_record"


def finished(file):
    """What `finish` was given for this shard; None where it is not there, or not whole."""
    done = file.with_suffix(".json")
    try:
        return json.loads(done.read_text()) if file.exists() else None
    except (OSError, ValueError):
        return None


def write(file, records, check):
    """Write records (an iterable of bytes) to a shard, read it back, put it in place; returns their number.

    `check(data)` raises what is wrong with a record that was read back. Raises UserError where the file cannot be
    written, or does not hold what was written.
    """
    unfinished, digests = file.with_suffix(".unfinished"), []
    with _writing(unfinished):
        writer = ArrayRecordWriter(str(unfinished), "group_size:1,uncompressed")  # images are compressed, latents noise
    try:
        for data in records:
            with _writing(unfinished):
                writer.write(data)
            digests.append(hashlib.sha256(data).digest())
    finally:
        with _writing(unfinished):
            writer.close()
    _verify(unfinished, digests, check)
    with _writing(file):
        unfinished.replace(file)
    return len(digests)


def finish(file, result):
    """Note `result` (a dict), without which the shard does not count."""
    with _writing(file):
        atomic_files.write_text(file.with_suffix(".json"), json.dumps(result))
    return result


@contextlib.contextmanager
def _writing(file):
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter is ArrayRecord's
        reason = " ".join(str(error).split())
        raise UserError(f"{file} cannot be written ({reason}): make room, and the same command goes on") from error


def _verify(file, digests, check):
    try:
        reader = packed_images.open_shard(file)
        same = reader.num_records() == len(digests)
        for row, digest in enumerate(digests if same else ()):
            data = reader.read([row])[0]
            same = same and hashlib.sha256(data).digest() == digest
            check(data)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{file} cannot be read back ({error}): is the disk full or failing?") from error
    if not same:
        raise UserError(f"{file} does not hold what was written: is the disk full or failing?")
