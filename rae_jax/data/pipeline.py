"""From a random-access source to batches: endless shuffled ones for training, and one exact pass.

A batch is {'image': uint8 [B, H, W, 3], 'label': int32 [B]}, this process's rows of the global batch, or has 'latent'
in place of the images where the source holds latents; a pass adds 'mask': float32 [B], 0 where the last batch was
filled up or an image could not be read. Global batch n is a pure function of source, seed and n: threads, workers,
processes and restarts do not change it.
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
from rae_jax.errors import UserError
from rae_jax.runtime import logs

BATCHES_AHEAD = 2  # read before they are asked for, by this process or by each worker
STAND_INS = 10  # images in a row that may be unreadable

_REPORTS = "reports"  # of a batch on its way from the reader: what could not be read


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
    """Endless shuffled batches: a fresh permutation each epoch; what is random depends on (seed, epoch, index).

    `random_crop` takes the source's `random_crop(index, rng)` where otherwise source[index] is taken, and `flip` its
    `mirrored(index)` where it has that; otherwise images are mirrored here. `num_workers`
    processes (0: this one) read with `num_threads` threads each. `on_error` says what becomes of an image that
    cannot be read: 'stop' raises its UserError; 'skip' reports it, and shows another one, drawn by (seed, epoch,
    index), in its row. `rows` are those of each global batch that this process reads (sharding.local_rows); by default
    all.
    """
    rows = range(batch_size) if rows is None else rows
    example = _TrainingExample(source, seed=seed, random_crop=random_crop, flip=flip, on_error=on_error)
    read = _Reader(TrainingOrder(len(source), batch_size, seed), rows, example, num_threads)
    identity = {"num_images": len(source), "batch_size": batch_size, "seed": seed}
    return Batches(read, identity, num_threads=num_threads, num_workers=num_workers)


def one_pass(source, *, batch_size, num_threads, num_workers=0, on_error="stop", rows=None):
    """Every image exactly once, in order; the last batch is filled up and masked.

    With `on_error`='skip' images that cannot be read are reported and masked; otherwise their UserError is raised.
    `rows` as in training_batches.
    """
    rows = range(batch_size) if rows is None else rows
    read = _Reader(OnePassOrder(len(source), batch_size), rows, _PassExample(source, on_error), num_threads)
    identity = {"num_images": len(source), "batch_size": batch_size}
    return Batches(read, identity, num_threads=num_threads, num_workers=num_workers)


def num_batches(source, batch_size):
    """Batches that `one_pass` yields."""
    return OnePassOrder(len(source), batch_size).num_batches


class Batches:
    """Batches by number, to iterate over. `identity`: what must be the same for a position to mean the same."""

    def __init__(self, read, identity, *, num_threads, num_workers):
        self.identity, self.num_workers = identity, num_workers
        self._read, self._num_threads = read, num_threads

    def __iter__(self):
        return BatchIterator(self)

    def places_of_step(self, step):
        """(epoch, [index]) of the whole global batch that a run's step, from 1, is made of."""
        places = self._read.order.places(step - 1, range(self.identity["batch_size"]))
        return places[0][0], [index for _, index in places if index < self.identity["num_images"]]

    def start(self, batch):
        """Grain's iterator over what the reader makes of `batch` and the numbers after it."""
        import grain  # here, so that a benchmark on made-up data does not need it

        end = sys.maxsize if self._read.num_batches is None else self._read.num_batches
        if batch >= end:
            return iter(())
        # One thread of Grain's, because the reader has its own: the images of one batch are read at the same time.
        options = grain.ReadOptions(num_threads=min(self._num_threads, 1), prefetch_buffer_size=BATCHES_AHEAD)
        dataset = grain.MapDataset.range(batch, end).map(self._read).to_iter_dataset(options)
        if self.num_workers:
            if not flags.FLAGS.is_parsed():  # in a notebook or a test; Grain asks them
                flags.FLAGS.mark_as_parsed()
            workers = grain.MultiprocessingOptions(num_workers=self.num_workers, per_worker_buffer_size=1)
            dataset = dataset.mp_prefetch(workers, worker_init_fn=_begin_worker)
        return iter(dataset)


class BatchIterator:
    """Batches one after the other; its state is the position of what was handed out, not of what was read ahead."""

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
                f"a worker process that reads data is gone ({' '.join(str(error).split())}): if it was killed for "
                f"want of memory, lower config.data.num_workers; the same command goes on from the last checkpoint"
            ) from error
        self._position += 1
        for report in batch.pop(_REPORTS):
            self._skipped += 1
            logs.say(f"skipped: {report} ({self._skipped} so far)", everywhere=True)
        return batch

    def get_state(self):
        """What a checkpoint keeps: plain numbers, the same on every process and for any number of them."""
        return {"position": self._position, **self._batches.identity}

    def set_state(self, state):
        """Go on from a state. Raises UserError where other data would follow."""
        for key, ours in self._batches.identity.items():
            if state.get(key) != ours:
                raise UserError(
                    f"the checkpoint was written with {key}={state.get(key)} of the training data, now it is {ours}: "
                    f"give the same data as then, or take another --workdir"
                )
        self.close()
        self._position = state["position"]

    def close(self):
        """End the threads and workers that read ahead; the next batch starts new ones."""
        if hasattr(self._reading, "close"):
            self._reading.close()
        self._reading = None


class _Reader:
    """From the number of a global batch to this process's rows of it, read by a few threads."""

    def __init__(self, order, rows, example, num_threads):
        self.order, self._rows, self._example, self._num_threads = order, rows, example, num_threads
        self.num_batches = order.num_batches

    def __call__(self, batch):
        places = self.order.places(batch, self._rows)
        found = list(self._pool.map(self._example, places) if self._num_threads else map(self._example, places))
        examples = [example for example, _ in found]
        arrays = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
        return {**arrays, _REPORTS: tuple(report for _, reports in found for report in reports)}

    @functools.cached_property  # made where it is used: a worker gets this object without it
    def _pool(self):
        return ThreadPoolExecutor(self._num_threads, thread_name_prefix="read")


class _TrainingExample:
    """From (epoch, index) to (example, reports)."""

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
        raise UserError(f"{STAND_INS} images in a row cannot be read, the last: {reports[-1]}")

    def _read(self, index, rng):
        if hasattr(self._source, "mirrored"):  # what cannot be mirrored now was before it was stored
            return self._source.mirrored(index) if self._flips(rng) else self._source[index]
        example = self._source.random_crop(index, rng) if self._random_crop else self._source[index]
        return {**example, "image": _mirrored(example["image"])} if self._flips(rng) else example

    def _flips(self, rng):
        return self._flip and rng.random() < 0.5


def _mirrored(image):
    """image[:, ::-1], copied one channel after the other: NumPy takes twice as long over pixels of three bytes."""
    mirrored = np.empty_like(image)
    for channel in range(image.shape[-1]):
        mirrored[..., channel] = image[:, ::-1, channel]
    return mirrored


class _PassExample:
    """From (0, index) to (example with its mask, reports)."""

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
        """The first readable image, masked: it has the shapes of all others."""
        for index in range(len(self._source)):
            try:
                return {**self._source[index], "mask": np.float32(0)}
            except UserError:
                if self._on_error == "stop":
                    raise
        raise UserError("none of the images can be read")


def _begin_worker(*_):
    """Ctrl-C is the main process's to handle, and a worker does not outlive it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)
