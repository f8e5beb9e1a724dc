"""Rates of the training loop, measured without stopping it."""

import time
from concurrent.futures import ThreadPoolExecutor

import jax


class Clock:
    """Measures the loop without stopping it: the host stays one step ahead of the devices, and no more.

    A thread sees when a step ends and when the next batch has come to the devices. In between they wait for data.
    """

    def __init__(self, batch_size):
        self._batch_size = batch_size
        self._watcher = ThreadPoolExecutor(1, thread_name_prefix="clock")
        self._previous, self._idle_since, self._fed = None, None, None
        self._steps, self._waited, self._began = 0, 0.0, time.monotonic()

    def wait_for(self, fetch):
        """Let `fetch` bring the next batch. What it takes while a step still runs costs nothing."""
        began = time.monotonic()
        batch = fetch()
        self._fed = self._watcher.submit(self._count, batch, began, self._idle_since)

    def tick(self, metrics):
        """A step has begun that will give these metrics; wait for the one before it."""
        self._idle_since = self._watcher.submit(_when_ready, metrics)
        if self._previous is not None:
            jax.block_until_ready(self._previous)
        self._previous = metrics
        self._steps += 1

    def read(self):
        """Rates since the last reading, data_wait as a part of the time; the batch that was fetched is waited for."""
        if self._fed is not None:
            self._fed.result()
        elapsed = time.monotonic() - self._began
        rates = {
            "perf/steps_per_second": self._steps / elapsed,
            "perf/images_per_second": self._steps * self._batch_size / elapsed,
            "perf/data_wait": self._waited / elapsed,
        }
        self._steps, self._waited, self._began = 0, 0.0, time.monotonic()
        return rates

    def close(self):
        """End the thread."""
        self._watcher.shutdown(wait=False, cancel_futures=True)

    def _count(self, batch, began, idle_since):
        """In the watcher, after `idle_since` has its result: one thread does things in order."""
        start = began if idle_since is None else max(began, idle_since.result())
        self._waited += max(0.0, _when_ready(batch) - start)


def _when_ready(arrays):
    jax.block_until_ready(arrays)
    return time.monotonic()
