"""Batches of a random-access source: endless shuffled batches for training, and one exact pass.

A batch is {'image': uint8 [B, H, W, 3], 'label': int32 [B]}, the rows of the global batch that belong to this process.
It has 'latent' instead of 'image' if the source holds latents. A pass adds 'mask': float32 [B], 0 for rows that fill up
the last batch and for images that cannot be read. Global batch n is a pure function of source, seed and n: threads,
workers, processes and restarts do not change it.
"""

import functools
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from absl import flags

from rae_jax.data.order import OnePassOrder, TrainingOrder
from rae_jax.errors import UserError, one_line
from rae_jax.runtime import logs

BATCHES_AHEAD = 2  # batches that this process, or each worker, reads ahead
STAND_INS = 10  # attempts to find a readable image

_REPORTS = "reports"  # key of a batch from the reader: messages on images that cannot be read


def training_batches(
    source,
    *,
    batch_size,
    seed,
    random_crop,
    flip,
    num_threads,
    num_workers=0,
    on_error="stop",
    rows=None,
):
    """Return endless shuffled Batches: a new permutation each epoch; all randomness depends on (seed, epoch, index).

    With `random_crop` the source's `random_crop(index, rng)` is read instead of source[index]. With `flip` half of the
    images are mirrored, by the source's `mirrored(index)` if it has one. `num_workers` processes (0: this one) read
    with `num_threads` threads each. `on_error`: 'stop' raises the UserError of an image that cannot be read; 'skip'
    reports it and puts another image, drawn by (seed, epoch, index), in its row. `rows`: the rows of each global batch
    that this process reads (sharding.local_rows); default: all rows.
    """
    rows = range(batch_size) if rows is None else rows
    example = _TrainingExample(source, seed=seed, random_crop=random_crop, flip=flip, on_error=on_error)
    read = _Reader(TrainingOrder(len(source), batch_size, seed), rows, example, num_threads)
    identity = {"num_images": len(source), "batch_size": batch_size, "seed": seed}
    return Batches(read, identity, num_threads=num_threads, num_workers=num_workers)


def one_pass(source, *, batch_size, num_threads, num_workers=0, on_error="stop", rows=None):
    """Return Batches of every image exactly once, in order; the last batch is filled up and masked.

    With `on_error`='skip' images that cannot be read are reported and masked; otherwise their UserError is raised.
    `rows` as in training_batches.
    """
    rows = range(batch_size) if rows is None else rows
    read = _Reader(OnePassOrder(len(source), batch_size), rows, _PassExample(source, on_error), num_threads)
    identity = {"num_images": len(source), "batch_size": batch_size}
    return Batches(read, identity, num_threads=num_threads, num_workers=num_workers)


def num_batches(source, batch_size):
    """Return the number of batches that `one_pass` yields."""
    return OnePassOrder(len(source), batch_size).num_batches


class Batches:
    """Batches by number, to iterate over. `identity`: {name: value} that a stored position depends on."""

    def __init__(self, read, identity, *, num_threads, num_workers):
        self.identity, self.num_workers = identity, num_workers
        self._read, self._num_threads = read, num_threads

    def __iter__(self):
        return BatchIterator(self)

    def places_of_step(self, step):
        """Return (epoch, [index]) of the whole global batch of a training step, numbered from 1."""
        places = self._read.order.places(step - 1, range(self.identity["batch_size"]))
        return places[0][0], [index for _, index in places if index < self.identity["num_images"]]

    def start(self, batch):
        """Return Grain's iterator over the batches from number `batch`."""
        import grain  # late, so that a benchmark on synthetic data does not need it

        end = sys.maxsize if self._read.num_batches is None else self._read.num_batches
        if batch >= end:
            return iter(())
        # One thread of Grain's: the reader has its own threads, which read the images of one batch at the same time.
        options = grain.ReadOptions(num_threads=min(self._num_threads, 1), prefetch_buffer_size=BATCHES_AHEAD)
        dataset = grain.MapDataset.range(batch, end).map(self._read).to_iter_dataset(options)
        if self.num_workers:
            if not flags.FLAGS.is_parsed():  # in a notebook or a test; Grain reads flags
                flags.FLAGS.mark_as_parsed()
            workers = grain.MultiprocessingOptions(num_workers=self.num_workers, per_worker_buffer_size=1)
            dataset = dataset.mp_prefetch(workers, worker_init_fn=_begin_worker)
        return iter(dataset)


class BatchIterator:
    """Iterates over batches; its state is the number of batches that it returned, without batches read ahead."""

    def __init__(self, batches):
        self._batches, self._position, self._reading, self._skipped = batches, 0, None, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self._reading is None:
            self._reading = self._batches.start(self._position)
        try:
            batch = next(self._reading)
        except RuntimeError as error:
            if not self._batches.num_workers:
                raise
            raise UserError(
                f"a worker process that reads data is gone ({one_line(error)}): if it was killed for "
                f"lack of memory, lower config.data.num_workers; the same command resumes from the last checkpoint"
            ) from error
        self._position += 1
        for report in batch.pop(_REPORTS):
            self._skipped += 1
            logs.say(f"skipped: {report} ({self._skipped} so far)", everywhere=True)
        return batch

    def get_state(self):
        """Return the state for a checkpoint: plain numbers, the same on every process and for any number of them."""
        return {"position": self._position, **self._batches.identity}

    def set_state(self, state):
        """Resume from a state. Raises UserError if other data would follow."""
        for key, ours in self._batches.identity.items():
            if state.get(key) != ours:
                raise UserError(
                    f"the checkpoint was written with {key}={state.get(key)} of the training data, now it is {ours}: "
                    f"use the same data again, or another --workdir"
                )
        self.close()
        self._position = state["position"]

    def close(self):
        """End the threads and workers that read ahead; the next batch starts new ones."""
        if hasattr(self._reading, "close"):
            self._reading.close()
        self._reading = None


class _Reader:
    """Reads the rows of a global batch, given its number, that belong to this process; by several threads."""

    def __init__(self, order, rows, example, num_threads):
        self.order, self._rows, self._example, self._num_threads = order, rows, example, num_threads
        self.num_batches = order.num_batches

    def __call__(self, batch):
        places = self.order.places(batch, self._rows)
        found = list(self._pool.map(self._example, places) if self._num_threads else map(self._example, places))
        examples = [example for example, _ in found]
        arrays = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
        return {**arrays, _REPORTS: tuple(report for _, reports in found for report in reports)}

    @functools.cached_property  # made when it is used: workers get this object without a pool
    def _pool(self):
        return ThreadPoolExecutor(self._num_threads, thread_name_prefix="read")


class _TrainingExample:
    """Reads (epoch, index) -> (example, reports)."""

    def __init__(self, source, *, seed, random_crop, flip, on_error):
        self._source, self._seed, self._flip, self._on_error = source, seed, flip, on_error
        self._random_crop = random_crop

    def __call__(self, place):
        epoch, index = place
        rng = np.random.default_rng((self._seed, epoch, index))
        reports = []
        for _ in range(STAND_INS):
            try:
                return self._read(index, rng), reports
            except UserError as error:
                if self._on_error == "stop":
                    raise
                reports.append(str(error))
                index = int(rng.integers(len(self._source)))
        raise UserError(
            f"{STAND_INS} images in a row cannot be read, repair the data: the last error is: {reports[-1]}"
        )

    def _read(self, index, rng):
        if hasattr(self._source, "mirrored"):  # latents were mirrored before they were stored
            return self._source.mirrored(index) if self._flips(rng) else self._source[index]
        example = self._source.random_crop(index, rng) if self._random_crop else self._source[index]
        return {**example, "image": _mirrored(example["image"])} if self._flips(rng) else example

    def _flips(self, rng):
        return self._flip and rng.random() < 0.5


def _mirrored(image):
    """Return image[:, ::-1], copied channel by channel: NumPy takes twice as long for pixels of three bytes."""
    mirrored = np.empty_like(image)
    for channel in range(image.shape[-1]):
        mirrored[..., channel] = image[:, ::-1, channel]
    return mirrored


class _PassExample:
    """Reads (0, index) -> (example with its mask, reports)."""

    def __init__(self, source, on_error):
        self._source, self._on_error = source, on_error

    def __call__(self, place):
        _, index = place
        if index >= len(self._source):
            return self._filler, ()
        try:
            return {**self._source[index], "mask": np.float32(1)}, ()
        except UserError as error:
            if self._on_error == "stop":
                raise
            return self._filler, (str(error),)

    @functools.cached_property
    def _filler(self):
        """The first readable image, masked: it has the shapes of all images."""
        for index in range(len(self._source)):
            try:
                return {**self._source[index], "mask": np.float32(0)}
            except UserError:
                if self._on_error == "stop":
                    raise
        raise UserError("none of the images can be read: check the files that config.data.path names")


def _begin_worker(*_):
    """Leave Ctrl-C to the main process, and end this worker when the main process ends for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)
