"""Writing of files that are complete or do not exist, even if the write is interrupted."""

import contextlib
import errno
import os
import secrets
import time

from etils import epath

from rae_jax.errors import one_line

# Errors of file systems that have no hard links, such as mounted buckets and drives.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
SETTLE = 2.0  # seconds until writers of an object without a precondition see each other


def write_text(path, text):
    """Write a whole file or nothing. Raises OSError if the file cannot be written; its old content then stays."""
    write_bytes(path, text.encode())


def write_bytes(path, data):
    """Write a whole file or nothing. Raises OSError if the file cannot be written; its old content then stays."""
    path = epath.Path(path)
    if "://" in str(path):  # an object store shows an object once it is complete
        path.write_bytes(data)
        return
    unfinished = unfinished_of(path)
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def create(path, text):
    """Write a whole file that does not exist yet; return False if it exists. Of several callers, one gets True.

    On gs:// the write has the precondition that the object does not exist.
    """
    path = epath.Path(path)
    if "://" in str(path):
        return _create_object(path, text)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        unfinished.write_text(text)
        os.link(unfinished, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create_without_link(path, text)
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            unfinished.unlink()
    return True


def _create_without_link(path, text):
    try:
        with open(path, "x") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _create_object(path, text):
    if path.exists():
        return False
    try:
        import gcsfs
    except ImportError:  # TensorFlow's access to buckets has no precondition
        path.write_text(text)
        time.sleep(SETTLE)
        return path.read_text() == text
    try:
        gcsfs.GCSFileSystem().pipe_file(str(path), text.encode(), mode="create")
    except FileExistsError:
        return False
    return True


def append_text(path, text):
    """Append text to a file; create the file if it does not exist."""
    path = epath.Path(path)
    if "://" in str(path):  # an object store cannot append
        path.write_text((path.read_text() if path.exists() else "") + text)
        return
    with path.open("a") as file:
        file.write(text)


def size(path):
    """Return the size of a file in bytes; epath's stat also asks for the owner's name, which a container may lack."""
    return epath.Path(path).stat().length if "://" in str(path) else os.stat(path).st_size


def reason(error):
    """Return the reason of a failed read or write as one line. Errors of object stores' libraries have no errno."""
    return getattr(error, "strerror", None) or one_line(error)


def unfinished_of(path):
    """Return the path of a file while it is being written; a run that is killed may leave this path behind."""
    return path.with_name(f"{path.name}.unfinished")
