"""Files that are there whole or not at all, whatever interrupts their writing."""

from etils import epath


def write_text(path, text):
    """All of a file or nothing. Raises OSError where it cannot be written; what was there before stays."""
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
    """Add to the end of a file, which may not be there yet."""
    path = epath.Path(path)
    if "://" in str(path):  # an object store has no appending
        path.write_text((path.read_text() if path.exists() else "") + text)
        return
    with path.open("a") as file:
        file.write(text)


def reason(error):
    """Why something could not be written or read, in one line; what object stores' libraries raise has no errno."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def unfinished_of(path):
    """Where a file lies until it is whole; a run that is killed may leave it behind."""
    return path.with_name(f"{path.name}.unfinished")
