"""A thread next to the training loop: it writes heartbeat.json for monitors, and reports a step that takes too long.

heartbeat.json: 'stage', 'step' and 'num_steps'; 'doing' ('stepping', 'evaluating', 'saving', 'finished', 'stopped');
'steps_per_second' of recent steps; 'memory' in bytes, of the process and of the fullest device; 'time' (UTC), 'host',
'pid'.
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

SHORTEST_STALL = 30.0  # seconds; a shorter wait is never reported
_STEPS, _ENOUGH = 50, 3  # recent steps that give the usual duration of a step: at most, at least


class Heartbeat:
    """A context manager that writes the file and checks for a stalled step every `every` seconds (0: never).

    A step that takes `stalled` times as long as usual (0: no check) is reported with the loop's position in the code.
    Durations are measured by the monotonic clock, which does not jump.
    """

    def __init__(self, workdir, stage, *, start, every, stalled, shortest_stall=SHORTEST_STALL):
        self._path, self._stage, self._num_steps = workdir / "heartbeat.json", stage.name, stage.num_steps
        self._every, self._stalled, self._shortest = every, stalled, shortest_stall
        self._step, self._doing, self._last = start, "starting", None
        self._seconds = collections.deque(maxlen=_STEPS)
        self._loop, self._reported = threading.get_ident(), 0.0
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
        """Register a finished step."""
        now = time.monotonic()
        if self._last is not None:
            self._seconds.append(now - self._last)
        self._step, self._last, self._reported, self._doing = step, now, 0.0, "stepping"

    @contextlib.contextmanager
    def doing(self, activity):
        """Show another activity than steps while the block runs; its time does not count as the time of a step."""
        self._doing = activity
        try:
            yield
        finally:
            self._last, self._doing = time.monotonic(), "stepping"

    def _run(self):
        while not self._stop.wait(self._every):
            self._write()
            self._check_stalled()

    def _usual(self):
        return statistics.median(tuple(self._seconds))  # a copy, because the loop appends meanwhile

    def _check_stalled(self):
        if not self._stalled or self._doing != "stepping" or len(self._seconds) < _ENOUGH:
            return
        usual, waited = self._usual(), time.monotonic() - self._last
        if waited > max(self._stalled * usual, self._shortest, 2 * self._reported):
            self._reported = waited
            logs.say(
                f"{self._stage}: step {self._step + 1} has taken {waited:.0f} s so far, a step usually takes "
                f"{usual:.2g} s; the loop is at {_place(self._loop)}",
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
        with contextlib.suppress(Exception):  # the checkpoints report a full disk, or a bucket that cannot be reached
            atomic_files.write_text(self._path, json.dumps(state, indent=1) + "\n")


def _place(thread):
    """Return a thread's position: its last calls in this package, the innermost last, and the innermost call of all."""
    frames = traceback.extract_stack(sys._current_frames()[thread])
    package = Path(__file__).parents[1]
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(package)]
    shown = ours[-3:] + ([] if ours and frames[-1] is ours[-1] else frames[-1:])

    def name(frame):  # a file's name alone is not unique in the package
        path = Path(frame.filename)
        return path.relative_to(package) if path.is_relative_to(package) else path.name

    return " > ".join(f"{frame.name} ({name(frame)}:{frame.lineno})" for frame in shown)


def _memory():
    memory = {}
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory["process"] = pages * os.sysconf("SC_PAGE_SIZE")
    used = [stats["bytes_in_use"] for d in jax.local_devices() if "bytes_in_use" in (stats := d.memory_stats() or {})]
    if used:
        memory["device"] = max(used)
    return memory
