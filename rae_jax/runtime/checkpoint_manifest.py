"""The manifest of a checkpoint: the size and CRC-32 of every file in its folder, and its score."""

import concurrent.futures
import json
import math
import zlib

from rae_jax.runtime import atomic_files

NAME = "manifest.json"
_NOTE = "_CHECKPOINT_METADATA"  # Orbax's, written once more at the end; nothing is read from it
_CHUNK = 2**22  # bytes


def write(folder, score):
    """Write the manifest of a folder that is whole but for it."""
    (folder / NAME).write_text(json.dumps({"score": score, "files": _fingerprints(folder)}))


def note_score(path, score):
    """Give a checkpoint the score that it was written without; one without a manifest has none."""
    file = path / NAME
    if file.exists():
        atomic_files.write_text(file, json.dumps({**json.loads(file.read_text()), "score": score}))


def score(path):
    """The score that a checkpoint was written with, or None."""
    try:
        found = json.loads((path / NAME).read_text())["score"]
        return found if math.isfinite(found) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def damage(path):
    """What is wrong with a finished checkpoint, in words; None where all is as its manifest says.

    One without a manifest is of an earlier version, and nothing can be said. Raises OSError where it cannot be reached.
    """
    try:
        manifest = json.loads((path / NAME).read_text())["files"]
        expected = {name: (size, checksum) for name, (size, checksum) in manifest.items()}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{NAME} is garbled"
    missing = next((name for name in expected if not (path / name).exists()), None)
    if missing is not None:
        return f"{missing} is missing"
    found = _fingerprints(path, expected)
    for name, (size, checksum) in expected.items():
        if found[name][0] != size:
            return f"{name} has {found[name][0]} bytes, not {size}"
        if None not in (checksum, found[name][1]) and found[name][1] != checksum:  # copied to or from an object store
            return f"{name} is not what was written"
    return None


def set_aside(path):
    """Rename a damaged checkpoint, so that it no longer counts; returns the new path."""
    taken = sum(other.name.startswith(f"{path.name}.damaged") for other in path.parent.iterdir())
    aside = path.with_name(f"{path.name}.damaged" + (f"-{taken}" if taken else ""))
    path.rename(aside)
    return aside


def _fingerprints(folder, names=None):
    """{name: (size, CRC-32)} of the files in a folder. What lies in an object store was checked on its way there."""
    if names is None:
        names = sorted(str(path.relative_to(folder)) for path in _walk(folder))
    remote = "://" in str(folder)

    def fingerprint(name):
        path = folder / name
        if remote:
            return path.stat().length, None
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
