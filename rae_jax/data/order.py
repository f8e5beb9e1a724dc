"""Which image lies in which row of which global batch: pure arithmetic, the same for every number of processes."""

import functools

import numpy as np


class TrainingOrder:
    """Endless epochs, each a fresh permutation cut into whole batches.

    What is left over at the end of an epoch (less than a batch, other images every time) is not shown in it: no batch
    straddles two epochs, no image comes twice in one, and an epoch has as many steps as there are whole batches.
    """

    num_batches = None  # there is no last one

    def __init__(self, num_images, batch_size, seed):
        self._num_images, self._batch_size, self._seed = num_images, batch_size, seed

    def places(self, batch, rows):
        """(epoch, index) of some rows of global batch number `batch`."""
        epoch, within = divmod(batch, self._num_images // self._batch_size)
        order = _permutation(self._num_images, self._seed, epoch)
        return [(epoch, int(order[within * self._batch_size + row])) for row in rows]


@functools.lru_cache(maxsize=2)  # batches of two epochs are read at the same time at most
def _permutation(num_images, seed, epoch):
    """Four bytes an image. (Grain's own shuffle needs no memory, and took 1 ms an index on 100 images.)"""
    return np.random.default_rng((seed, epoch)).permutation(np.arange(num_images, dtype=np.int32))


class OnePassOrder:
    """Every image once, in order; indices beyond the last image fill up the last batch."""

    def __init__(self, num_images, batch_size):
        self.num_batches = -(-num_images // batch_size)
        self._batch_size = batch_size

    def places(self, batch, rows):
        """(0, index) of some rows of global batch number `batch`."""
        return [(0, batch * self._batch_size + row) for row in rows]
