"""Writing of files that are complete or do not exist, even if the write is interrupted."""

from etils import epath

from rae_jax.errors import one_line


def write_text(path, text):
    """Write a whole file or nothing. Raises OSError if the file cannot be written; its old content then stays."""
    path = epath.Path(path)
    if "://" in str(path):  # an object store shows an object once it is complete
        path.write_text(text)
        return
    unfinished = unfinished_of(path)
    try:
        unfinished.write_text(text)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def append_text(path, text):
    """Append text to a file; create the file if it does not exist."""
    path = epath.Path(path)
    if "://" in str(path):  # an object store cannot append
        path.write_text((path.read_text() if path.exists() else "") + text)
        return
    with path.open("a") as file:
        file.write(text)


def reason(error):
    """Return the reason of a failed read or write as one line. Errors of object stores' libraries have no errno."""
    return getattr(error, "strerror", None) or one_line(error)


def unfinished_of(path):
    """Return the path of a file while it is being written; a run that is killed may leave this path behind."""
    return path.with_name(f"{path.name}.unfinished")
