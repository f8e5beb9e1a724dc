"""Write shards of records: a finished shard is whole, and interrupted work is resumed."""

import contextlib
import hashlib
import json

from array_record.python.array_record_module import ArrayRecordWriter

from rae_jax.data import packed_images
from rae_jax.errors import UserError, one_line
from rae_jax.runtime import atomic_files

_REQUEST = "request.json"
INDEX_OF_SHARDS = "index"  # folder for the index of the shards that are packed; see shard_index


def claim(output, request):
    """Make the folder `output` for a request (a dict), or accept the folder of an equal request, to resume it.

    Raises UserError if the folder holds other files, which are left unchanged, and if it cannot be written.
    """
    path = output / _REQUEST
    try:
        output.mkdir(parents=True, exist_ok=True)
        if path.exists() and not _is_continued(_read(path), json.loads(json.dumps(request))):
            raise UserError(
                f"--output={output} holds shards of other data or with other options: choose another folder"
            )
        # A killed process may have left the unfinished file.
        own = {path, atomic_files.unfinished_of(path), output / INDEX_OF_SHARDS}
        if not path.exists() and set(output.iterdir()) - own:
            raise UserError(f"--output={output} is not empty: choose another folder")
        atomic_files.write_text(path, json.dumps(request))
    except OSError as error:
        raise UserError(
            f"cannot write to --output={output} ({atomic_files.reason(error)}): choose a folder that you can write to"
        ) from error


def _is_continued(theirs, ours):
    """Return whether our request is theirs, or is theirs with what older versions did not store."""
    return theirs == {key: ours.get(key) for key in theirs} and ours.keys() - theirs.keys() <= {"labels"}


def _read(path):
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged: remove its folder, or choose another --output") from error


def name(split, number, count):
    """Return the name of the file of a shard."""
    return f"{split}-{number:05d}-of-{count:05d}.array_record"


def finished(file):
    """Return the result that `finish` stored for a shard; None if the shard does not exist or is not whole."""
    done = file.with_suffix(".json")
    try:
        return json.loads(done.read_text()) if file.exists() else None
    except (OSError, ValueError):
        return None


def write(file, records, check):
    """Write records (an iterable of bytes) to a shard, read it back, put it in place; return the number of records.

    `check(data)` raises an error if a record that was read back is wrong. Raises UserError if the file cannot be
    written, or does not hold the records that were written.
    """
    unfinished, digests = file.with_suffix(".unfinished"), []
    with _writing(unfinished):
        # Images are compressed already; latents are noise.
        writer = ArrayRecordWriter(str(unfinished), "group_size:1,uncompressed")
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
    """Store `result` (a dict) next to a shard, which marks the shard as finished."""
    with _writing(file):
        atomic_files.write_text(file.with_suffix(".json"), json.dumps(result))
    return result


@contextlib.contextmanager
def _writing(file):
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError
        reason = one_line(error)
        raise UserError(
            f"{file} cannot be written ({reason}): make room, and run the same command to resume"
        ) from error


def _verify(file, digests, check):
    try:
        reader = packed_images.open_shard(file)
        same = reader.num_records() == len(digests)
        for row, digest in enumerate(digests if same else ()):
            data = reader.read([row])[0]
            same = same and hashlib.sha256(data).digest() == digest
            check(data)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read back ({one_line(error)}): check that the disk is neither full nor failing"
        ) from error
    if not same:
        raise UserError(
            f"{file} does not hold the records that were written: check that the disk is neither full nor failing"
        )
