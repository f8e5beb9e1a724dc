"""What an evaluation keeps of the batches that pass."""

import numpy as np

from rae_jax.inference import metrics


class Collector:
    """Collects outputs {name: [B, ...]} of batches: the arrays of the names in `arrays`, the moments of those in `moments`.

    Moments of features [B, D] need no memory per image.
    """

    def __init__(self, *, arrays=(), moments=()):
        self.moments = {}  # {name: metrics.Moments} of the names that occurred
        self._names, self._batches = moments, {name: [] for name in arrays}

    def add(self, outputs):
        """Take in the outputs of a batch; names that are not collected are ignored."""
        for name in self._names:
            if name in outputs:
                before = self.moments.get(name, metrics.Moments())
                self.moments[name] = metrics.merge(before, metrics.moments(outputs[name]))
        for name, batches in self._batches.items():
            if name in outputs:
                batches.append(outputs[name])

    def arrays(self):
        """Return {name: [N, ...]} of the names that occurred."""
        return {name: np.concatenate(batches) for name, batches in self._batches.items() if batches}
