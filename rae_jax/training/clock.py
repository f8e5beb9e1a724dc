"""Rates of the training loop, measured without a wait of the devices."""

import time
from concurrent.futures import ThreadPoolExecutor

import jax


class Clock:
    """Measurement of the loop without a wait of the devices: the host stays exactly one step ahead of them.

    A thread notes when a step ends and when the next batch is on the devices. Between these times the devices wait for
    data.
    """

    def __init__(self, batch_size):
        self._batch_size = batch_size
        self._watcher = ThreadPoolExecutor(1, thread_name_prefix="clock")
        self._previous, self._idle_since, self._fetched = None, None, None
        self._steps, self._waited, self._began = 0, 0.0, time.monotonic()

    def wait_for(self, fetch):
        """Call `fetch` for the next batch. Its time counts only after the running step has ended."""
        began = time.monotonic()
        batch = fetch()
        self._fetched = self._watcher.submit(self._count, batch, began, self._idle_since)

    def tick(self, metrics):
        """Register a step that has begun and its future metrics; wait for the step before it."""
        self._idle_since = self._watcher.submit(_when_ready, metrics)
        if self._previous is not None:
            jax.block_until_ready(self._previous)
        self._previous = metrics
        self._steps += 1

    def read(self):
        """Return the rates since the last call, data_wait as a fraction of the time; wait for the fetched batch."""
        if self._fetched is not None:
            self._fetched.result()
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
        """Add the wait for a batch, in the watcher; its single thread has computed `idle_since` before."""
        start = began if idle_since is None else max(began, idle_since.result())
        self._waited += max(0.0, _when_ready(batch) - start)


def _when_ready(arrays):
    jax.block_until_ready(arrays)
    return time.monotonic()
