"""The image in each row of each global batch: pure arithmetic, the same for every number of processes."""

import functools

import numpy as np


class TrainingOrder:
    """Endless epochs, each a new permutation cut into whole batches.

    The images left over at the end of an epoch (less than a batch, other images in each epoch) are not used in it. So
    no batch belongs to two epochs, no image occurs twice in one, and an epoch has as many steps as whole batches.
    """

    num_batches = None  # no last batch exists

    def __init__(self, num_images, batch_size, seed):
        self._num_images, self._batch_size, self._seed = num_images, batch_size, seed

    def places(self, batch, rows):
        """Return (epoch, index) for each of some rows of global batch number `batch`."""
        epoch, within = divmod(batch, self._num_images // self._batch_size)
        order = _permutation(self._num_images, self._seed, epoch)
        return [(epoch, int(order[within * self._batch_size + row])) for row in rows]


@functools.lru_cache(maxsize=2)  # at most two epochs are read at the same time
def _permutation(num_images, seed, epoch):
    """Return the permutation of an epoch, int32: four bytes an image."""
    # Grain's shuffle needs no memory, but took 1 ms an index on 100 images.
    return np.random.default_rng((seed, epoch)).permutation(np.arange(num_images, dtype=np.int32))


class OnePassOrder:
    """Every image once, in order; indices beyond the last image fill up the last batch."""

    def __init__(self, num_images, batch_size):
        self.num_batches = -(-num_images // batch_size)
        self._batch_size = batch_size

    def places(self, batch, rows):
        """Return (0, index) for each of some rows of global batch number `batch`."""
        return [(0, batch * self._batch_size + row) for row in rows]
