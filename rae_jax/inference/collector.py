"""Collector of the outputs of an evaluation, batch by batch."""

import numpy as np

from rae_jax.inference import metrics


class Collector:
    """Collects outputs {name: [B, ...]} of batches: arrays of the names in `arrays`, moments of the names in `moments`.

    Moments of features [B, D] take the same memory for any number of images.
    """

    def __init__(self, *, arrays=(), moments=()):
        self.moments = {}  # {name: metrics.Moments}, without names that never occurred
        self._moment_names, self._batches = moments, {name: [] for name in arrays}

    def add(self, outputs):
        """Add the outputs of a batch; names that are not collected are ignored."""
        for name in self._moment_names:
            if name in outputs:
                before = self.moments.get(name, metrics.Moments())
                self.moments[name] = metrics.merge(before, metrics.moments(outputs[name]))
        for name, batches in self._batches.items():
            if name in outputs:
                batches.append(outputs[name])

    def array(self, name):
        """Return [N, ...] of a name in `arrays`, or None if the name never occurred."""
        batches = self._batches[name]
        return np.concatenate(batches) if batches else None
