"""The manifest of a checkpoint: the size and CRC-32 of every file in its folder, and its score."""

import concurrent.futures
import json
import math
import zlib

from rae_jax.runtime import atomic_files

NAME = "manifest.json"
_NOTE = "_CHECKPOINT_METADATA"  # a file that Orbax writes again at the end; nothing reads it
_CHUNK = 2**22  # bytes


def write(folder, score):
    """Write the manifest of a folder that holds all other files."""
    (folder / NAME).write_text(json.dumps({"score": score, "files": _fingerprints(folder)}))


def note_score(path, score):
    """Add the score to a checkpoint that was written without one; do nothing if it has no manifest."""
    file = path / NAME
    if file.exists():
        atomic_files.write_text(file, json.dumps({**json.loads(file.read_text()), "score": score}))


def score(path):
    """Return the score of a checkpoint, or None."""
    try:
        found = json.loads((path / NAME).read_text())["score"]
        return found if math.isfinite(found) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def damage(path):
    """Return the damage of a finished checkpoint in words; None if its files agree with its manifest.

    A checkpoint without a manifest is from an earlier version and counts as undamaged. Raises OSError if the checkpoint
    cannot be reached.
    """
    try:
        manifest = json.loads((path / NAME).read_text())["files"]
        expected = {name: (size, checksum) for name, (size, checksum) in manifest.items()}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{NAME} is not readable"
    missing = next((name for name in expected if not (path / name).exists()), None)
    if missing is not None:
        return f"{missing} is missing"
    found = _fingerprints(path, expected)
    for name, (size, checksum) in expected.items():
        if found[name][0] != size:
            return f"{name} has {found[name][0]} bytes, not {size}"
        if None not in (checksum, found[name][1]) and found[name][1] != checksum:  # None: written by an object store
            return f"{name} differs from the file that was written"
    return None


def set_aside(path):
    """Rename a damaged checkpoint, so that it no longer counts; return the new path."""
    taken = sum(other.name.startswith(f"{path.name}.damaged") for other in path.parent.iterdir())
    aside = path.with_name(f"{path.name}.damaged" + (f"-{taken}" if taken else ""))
    path.rename(aside)
    return aside


def _fingerprints(folder, names=None):
    """Return {name: (size, CRC-32)} of the files in a folder; CRC-32 is None in object stores, which check uploads."""
    if names is None:
        names = sorted(str(path.relative_to(folder)) for path in _walk(folder))
    remote = "://" in str(folder)

    def fingerprint(name):
        path = folder / name
        if remote:
            return atomic_files.size(path), None
        checksum, size = 0, 0
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
        return size, checksum

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(fingerprint, names), strict=True))


def _walk(folder):
    for path in folder.iterdir():
        if path.name != _NOTE:
            yield from _walk(path) if path.is_dir() else (path,)
