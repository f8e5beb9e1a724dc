"""From a random-access source to batches: Grain pipelines for training and for one exact pass.

A batch is {'image': uint8 [B, H, W, 3], 'label': int32 [B]}, this process's part of the global batch; a pass
adds 'mask': float32 [B], 0 where the last batch was filled up.
"""

import grain
import jax
import numpy as np


def training_batches(source, *, batch_size, seed, random_crop, flip, num_threads):
    """Endless shuffled batches: a fresh permutation each epoch; what is random depends on (seed, epoch, index).

    `random_crop` takes the source's `random_crop(index, rng)` where otherwise source[index] is taken.
    """
    dataset = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat(None)
    dataset = dataset.random_map(source.random_crop) if random_crop else dataset.map(source.__getitem__)
    if flip:
        dataset = dataset.random_map(_flip)
    dataset = dataset[jax.process_index() :: jax.process_count()]
    dataset = dataset.batch(batch_size // jax.process_count(), drop_remainder=True)
    return dataset.to_iter_dataset(_read_options(num_threads))


def one_pass(source, *, batch_size, num_threads):
    """Every image exactly once, in order; the last batch is filled up and masked."""
    total = -(-len(source) // batch_size) * batch_size
    dataset = grain.MapDataset.range(total).map(_Padded(source))
    dataset = dataset[jax.process_index() :: jax.process_count()]
    return dataset.batch(batch_size // jax.process_count()).to_iter_dataset(_read_options(num_threads))


def num_batches(source, batch_size):
    """Batches that `one_pass` yields."""
    return -(-len(source) // batch_size)


class _Padded:
    """Image `index` of a source, or beyond its end image 0 with mask 0."""

    def __init__(self, source):
        self._source = source

    def __call__(self, index):
        inside = index < len(self._source)
        return {**self._source[index if inside else 0], "mask": np.float32(inside)}


def _flip(example, rng):
    if rng.random() < 0.5:
        example = {**example, "image": example["image"][:, ::-1]}
    return example


def _read_options(num_threads):
    return grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * max(num_threads, 1))
