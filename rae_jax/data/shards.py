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
_COMPRESSED = {".gz", ".tgz", ".bz2", ".xz", ".zst"}


def files_at(given, key, suffix, named):
    """Return the paths of the shards at a path, sorted: all files with a suffix in a folder, a file, or a pattern.

    A pattern has braces, {000..146} or {a,b}, or the wildcards of a shell. `key` names the path in messages, `named`
    all settings (see sources.Settings). Raises UserError for shards that do not exist, are compressed as a whole, or
    are of several splits.
    """
    value, path = f"{key}={given!r}", os.path.expanduser(given)
    found = _in_folder(path, value, suffix, named) if given and os.path.isdir(path) else _of_pattern(path, value)
    for file in found:
        if not file.lower().endswith(suffix) or not os.path.isfile(file):
            raise UserError(f"{value}: {file} is not a {suffix} file: {_fix({Path(file).suffix.lower()})}")
    patterns = f"set {named.path}='.../{{}}{suffix}' and {named.heldout_path}='.../{{}}{suffix}'"
    class_folders.refuse_splits(
        {Path(file).stem for file in found},
        value,
        lambda *both: patterns.format(*map(class_folders.pattern_of_split, both)),
    )
    return found


def _in_folder(path, value, suffix, named):
    tree = listing.Tree(path, {suffix})
    if not tree.names:
        raise UserError(f"{value} holds no {suffix} files: {_fix(tree.suffixes)}")
    folder = Path(path)
    class_folders.refuse_splits_of_tree(
        tree.names,
        value,
        lambda train, other: f"set {named.path}={folder / train} and {named.heldout_path}={folder / other}",
    )
    return [os.path.join(path, name) for name in tree.names]


def _of_pattern(path, value):
    found, missing = {}, []
    for pattern in _expanded(path):
        files = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
        found.update(dict.fromkeys(files))
        missing += [] if files else [pattern]
        if len(found) + len(missing) > _MOST:
            raise UserError(f"{value} is a pattern of more than {_MOST} files: correct its braces")
    if missing or not found:
        first = f"{missing[0]!r} does not exist ({len(missing)} in all)" if missing else "the pattern names no files"
        raise UserError(f"{value}: {first}: name a folder, a file or a pattern")
    return list(found)


def _fix(suffixes):
    """Return what to do about files with other suffixes."""
    if _COMPRESSED & set(suffixes):
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
