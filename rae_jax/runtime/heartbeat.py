"""A thread beside the loop: heartbeat.json for whoever watches a run, and a line where a step takes far too long.

heartbeat.json: 'stage', 'step' and 'num_steps'; 'doing' ('stepping', 'evaluating', 'saving', 'finished', 'stopped');
'steps_per_second' lately; 'memory' in bytes, of the process and of the fullest device; 'time' (UTC), 'host', 'pid'.
"""

import collections
import contextlib
import datetime
import json
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from pathlib import Path

import jax

from rae_jax.runtime import atomic_files, logs

SHORTEST_STALL = 30.0  # seconds: below that nobody wants to know
_STEPS, _ENOUGH = 50, 3  # that say how long a step usually takes: at most, at least


class Heartbeat:
    """A context manager. Every `every` seconds (0: never) the file is written, and the step is looked after.

    A step that takes `stalled` times (0: any time) as long as usual is reported with what the loop is at. Whatever is
    measured, is by the monotonic clock, which does not jump.
    """

    def __init__(self, workdir, stage, *, start, every, stalled, shortest_stall=SHORTEST_STALL):
        self._path, self._stage, self._num_steps = workdir / "heartbeat.json", stage.name, stage.num_steps
        self._every, self._stalled, self._shortest = every, stalled, shortest_stall
        self._step, self._doing, self._last = start, "starting", None
        self._seconds = collections.deque(maxlen=_STEPS)
        self._loop, self._told = threading.get_ident(), 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self):
        if self._every:
            self._write()
            self._thread.start()
        return self

    def __exit__(self, kind, *_):
        self._doing = "finished" if kind is None else "stopped"
        if self._every:
            self._stop.set()
            self._thread.join()
            self._write()

    def beat(self, step):
        """A step has been done."""
        now = time.monotonic()
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._step, self._last, self._told, self._doing = step, now, 0.0, "stepping"

    @contextlib.contextmanager
    def doing(self, what):
        """Something else than steps, whose time is not theirs."""
        self._doing = what
        try:
            yield
        finally:
            self._last, self._doing = time.monotonic(), "stepping"

    def _run(self):
        while not self._stop.wait(self._every):
            self._write()
            self._look()

    def _usual(self):
        return statistics.median(tuple(self._seconds))  # copied at once: the loop goes on meanwhile

    def _look(self):
        if not self._stalled or self._doing != "stepping" or len(self._seconds) < _ENOUGH:
            return
        usual, waited = self._usual(), time.monotonic() - self._last
        if waited > max(self._stalled * usual, self._shortest, 2 * self._told):
            self._told = waited
            logs.say(
                f"{self._stage}: step {self._step + 1} has taken {waited:.0f} s, where one takes {usual:.2g}; the loop "
                f"is at {_place(self._loop)}",
                everywhere=True,
            )

    def _write(self):
        if jax.process_index() != 0:
            return
        rate = 1 / max(self._usual(), 1e-9) if self._seconds else 0.0
        state = {
            **{"stage": self._stage, "step": self._step, "num_steps": self._num_steps, "doing": self._doing},
            **{"steps_per_second": round(rate, 4), "memory": _memory()},
            **{"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")},
            **{"host": socket.gethostname(), "pid": os.getpid()},
        }
        with contextlib.suppress(Exception):  # a full disk, or a bucket that is away, is the checkpoints' to report
            atomic_files.write_text(self._path, json.dumps(state, indent=1) + "\n")


def _place(thread):
    """Where a thread is: the calls in this package, the innermost last, and where those have led."""
    frames = traceback.extract_stack(sys._current_frames()[thread])
    package = str(Path(__file__).parents[1])
    ours = [frame for frame in frames if frame.filename.startswith(package)]
    shown = ours[-3:] + ([] if ours and frames[-1] is ours[-1] else frames[-1:])
    return " > ".join(f"{frame.name} ({Path(frame.filename).name}:{frame.lineno})" for frame in shown)


def _memory():
    memory = {}
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory["process"] = pages * os.sysconf("SC_PAGE_SIZE")
    used = [stats["bytes_in_use"] for d in jax.local_devices() if "bytes_in_use" in (stats := d.memory_stats() or {})]
    if used:
        memory["device"] = max(used)
    return memory
