"""Lines of an object on gs://, to which nothing can be appended: a thread writes the whole object now and then."""

import threading

from rae_jax.runtime import atomic_files

EVERY = 20.0  # seconds between two writes


class RemoteLines:
    """Writer of lines to `path`; `say` reports once that the object cannot be written. Lines are kept until it can."""

    def __init__(self, path, lines, say):
        self._path, self._lines, self._say = path, list(lines), say
        self._written, self._failed = len(self._lines), False
        self._changed, self._lock, self._stop = threading.Event(), threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def append(self, line):
        """Add a line and return at once."""
        self._lines.append(line)
        self._changed.set()

    def flush(self):
        """Write all lines now; return when they are written or could not be written."""
        with self._lock:
            count = len(self._lines)
            if count == self._written:
                return
            try:
                self._path.write_text("".join(f"{line}\n" for line in self._lines[:count]))
            except Exception as error:  # of many kinds, if a bucket cannot be reached
                if not self._failed:
                    reason = atomic_files.reason(error)
                    self._say(f"{self._path} cannot be written ({reason}): training continues, the lines are kept")
                self._failed = True
                return
            if self._failed:
                self._say(f"{self._path} can be written again: no line is lost")
            self._written, self._failed = count, False

    def close(self):
        """Write all lines and end the thread."""
        self._stop.set()
        self._changed.set()
        self._thread.join()
        self.flush()

    def _run(self):
        while not self._stop.wait(EVERY):
            self._changed.wait()
            self._changed.clear()
            self.flush()
