"""The end of a run of several processes: if one process fails, all others end with its exit status.

JAX itself waits for all processes at the end of a program, and aborts the remaining ones after a timeout.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback

import jax
from jax._src import distributed  # the key-value store of jax.distributed has no public name

from rae_jax.errors import one_line

POLL_INTERVAL = 2.0  # seconds between two checks of the other processes' messages
_KEY = "rae_jax/ended"


@contextlib.contextmanager
def end_together(agreed):
    """End all processes, with the reason, if the block of this process ends by an exception.

    Exceptions of the types `agreed` pass: all processes raise them at the same time. A run of one process ends at once
    after SystemExit: threads of a checkpoint that cannot be written would delay its end by minutes.
    """
    try:
        yield
    except agreed:
        raise
    except SystemExit as stop:
        if not isinstance(stop.code, int) or stop.code == 0:
            raise
        end(stop.code, getattr(stop, "message", ""))
    except BaseException as error:
        if _client() is None:
            raise
        traceback.print_exc()
        end(1, f"{type(error).__name__}: {error}")


def watch():
    """Start a thread that ends this process soon after another process has ended; a run of one process starts none."""
    if _client() is not None:
        threading.Thread(target=_watch, name="shutdown", daemon=True).start()


def end(status, message):
    """Tell the other processes the status and the message, and end this one at once, without waiting for threads."""
    try:
        if _client() is not None:
            index = distributed.global_state.process_id
            line = one_line(message, longest=300) if message else ""
            ended = {"process": index, "status": status, "message": line}
            _client().key_value_set(_KEY, json.dumps(ended))
    except jax.errors.JaxRuntimeError:  # another process wrote the key before, or the first process is lost
        pass
    finally:
        _leave(status)


def end_if_another_has():
    """End with the status of another process that has ended; return if none has."""
    try:
        ended = json.loads(_client().key_value_try_get(_KEY))
    except (jax.errors.JaxRuntimeError, AttributeError):  # no process has ended, no answer, or this run is ending
        return
    if ended["process"] == distributed.global_state.process_id:
        return
    reason = f" ({ended['message']})" if ended["message"] else ""
    with contextlib.suppress(OSError):
        print(f"process {ended['process']} of this run ended with status {ended['status']}{reason}", file=sys.stderr)
    _leave(ended["status"])


def _leave(status):
    """End this process; the first process, which holds the key-value store, waits until the others have read it."""
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        if _client() is not None and distributed.global_state.process_id == 0:
            time.sleep(2 * POLL_INTERVAL + 1)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # a closed pipe, a full disk
                stream.flush()
    finally:
        os._exit(status)


def _watch():
    while _client() is not None:
        time.sleep(POLL_INTERVAL)
        end_if_another_has()


def _client():
    """Return the client of the key-value store; None in a run of one process."""
    return distributed.global_state.client
