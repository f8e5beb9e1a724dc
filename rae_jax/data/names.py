"""Names of images in two arrays: a million names take 100 MB, and are sent to a worker process at once."""

import numpy as np


class Names:
    """Sequence of strings. Bytes of file names that are not UTF-8 are kept as Python's `surrogateescape` has them."""

    def __init__(self, strings):
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        self._bytes, self._ends = b"".join(encoded), np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])

    def __len__(self):
        return len(self._ends) - 1

    def __getitem__(self, index):
        return self.take([index])[0]

    def take(self, indices):
        """Return the list of the strings with these indices."""
        indices = np.asarray(indices)
        places = zip(self._ends[indices].tolist(), self._ends[indices + 1].tolist(), strict=True)
        return [self._bytes[start:end].decode("utf-8", "surrogateescape") for start, end in places]

    def arrays(self):
        """Return (uint8 [all bytes], int64 [N + 1] ends), for a file."""
        return np.frombuffer(self._bytes, np.uint8), self._ends

    @classmethod
    def of_arrays(cls, characters, ends):
        """Return the names of which `arrays` are these."""
        names = cls(())
        names._bytes, names._ends = characters.tobytes(), ends
        return names
