"""How a run of several processes ends: where one cannot go on, none can, and all end with its exit status.

JAX's own way is to wait at the end of a program for all processes, and to abort what is left after a while.
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

LOOK = 2.0  # seconds between two looks at what the others say
_KEY = "rae_jax/ended"


@contextlib.contextmanager
def together(agreed):
    """Around all that this process does: what ends it ends the others, who see why; but exceptions of the types
    `agreed` are raised by all at the same time. A process that is alone ends at once, too: threads of a checkpoint that
    cannot be written would hold it up for minutes.
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
    """From here on, where there are others, this process ends soon after one of them that says so."""
    if _client() is not None:
        threading.Thread(target=_watch, name="ending", daemon=True).start()


def end(status, message):
    """End this process at once, having told the others; without what a program does at its end, waiting for threads."""
    try:
        if _client() is not None:
            index = distributed.global_state.process_id
            why = {"process": index, "status": status, "message": " ".join(message.split())[:300]}
            _client().key_value_set(_KEY, json.dumps(why))
    except jax.errors.JaxRuntimeError:  # another one was first, or the first process is gone
        pass
    finally:
        _leave(status)


def follow():
    """End as another process has that said so; return where none did."""
    try:
        why = json.loads(_client().key_value_try_get(_KEY))
    except (jax.errors.JaxRuntimeError, AttributeError):  # nobody has, or no answer; or this is the run's end
        return
    if why["process"] == distributed.global_state.process_id:
        return
    said = f" ({why['message']})" if why["message"] else ""
    with contextlib.suppress(OSError):
        print(f"process {why['process']} of this run ended with status {why['status']}{said}", file=sys.stderr)
    _leave(why["status"])


def _leave(status):
    """End, whatever comes between; the first process, which keeps what is told, when all can have seen it."""
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        if _client() is not None and distributed.global_state.process_id == 0:
            time.sleep(2 * LOOK + 1)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # a pipe that is closed, a disk that is full
                stream.flush()
    finally:
        os._exit(status)


def _watch():
    while _client() is not None:
        time.sleep(LOOK)
        follow()


def _client():
    """Of the store; None where there are no others."""
    return distributed.global_state.client
