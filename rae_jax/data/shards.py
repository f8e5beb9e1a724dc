"""The shards at a path: tar or parquet files."""

import glob
import os
import re
from pathlib import Path

from rae_jax.data import class_folders, listing
from rae_jax.errors import UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST = 10**6  # shards of a pattern


def files_at(given, key, suffix):
    """Return the paths of the shards at a path, sorted: all files with a suffix in a folder, a file, or a pattern.

    A pattern has braces, {000..146} or {a,b}, or the wildcards of a shell. Raises UserError, which names the path by
    `key`, for shards that do not exist, are compressed as a whole, or are of several splits.
    """
    named, path = f"{key}={given!r}", os.path.expanduser(given)
    found = _in_folder(path, named, suffix) if given and os.path.isdir(path) else _of_pattern(path, named)
    for file in found:
        if not file.endswith(suffix):
            raise UserError(f"{named}: {file} is not a {suffix} file: {_fix(Path(file).suffix.lower())}")
    class_folders.refuse_splits(
        {os.path.basename(file).removesuffix(suffix) for file in found},
        named,
        lambda train, other: (
            f"name them by patterns, config.data.path='.../{_pattern(train)}{suffix}' and "
            f"config.data.heldout_path='.../{_pattern(other)}{suffix}'"
        ),
    )
    return found


def _in_folder(path, named, suffix):
    files = [file for file in sorted(Path(path).rglob("*")) if file.is_file()]
    shown = [file for file in files if not any(map(class_folders.is_hidden, file.relative_to(path).parts))]
    found = [str(file) for file in shown if file.suffix.lower() == suffix]
    if not found:
        suffixes = {file.suffix.lower() for file in shown}
        raise UserError(f"{named} holds no {suffix} files: {_fix(*sorted(suffixes))}")
    return found


def _of_pattern(path, named):
    found, missing = [], []
    for pattern in _expanded(path):
        files = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern))
        found += files
        missing += [] if files else [pattern]
        if len(found) + len(missing) > _MOST:
            raise UserError(f"{named} is a pattern of more than {_MOST} files: correct its braces")
    if missing or not found:
        first = missing[0] if missing else path
        raise UserError(
            f"{named}: {first!r} does not exist ({len(missing)} in all): name a folder, a file or a pattern"
        )
    return found


def _fix(*suffixes):
    """Return what to do about files with other suffixes."""
    if {".gz", ".tgz", ".bz2", ".xz", ".zst"} & set(suffixes):
        return "compressed shards cannot be read at random places: decompress them once (gunzip)"
    return listing.other_source(suffixes) or "for images in folders set source='image_folder'"


def _expanded(pattern):
    """Yield the names of a pattern with braces."""
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    if numbers := _RANGE.fullmatch(found[1]):
        first, last = numbers.groups()
        values = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    else:
        values = found[1].split(",")
    for value in values:
        yield from _expanded(pattern[: found.start()] + value + pattern[found.end() :])


def _pattern(name):
    """Return the pattern of the shards of a split, from the name of one: its numbers become '*'."""
    return re.sub(r"[-_.]?\d.*$", "-*", name)
