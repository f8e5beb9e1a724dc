"""One run per workdir: WORKDIR/lock.json says whose it is.

It holds 'host', 'machine', 'pid' and 'started' of the process, a 'token' of its own, and 'beat', which its thread
counts up. On the same machine a process that is gone is seen at once; elsewhere a lock is stale when its beat stands
still while it is watched. So no clock is compared with another, and one that jumps changes nothing. No file system's
own locks are needed: gs:// has none.
"""

import contextlib
import datetime
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path

import jax
from etils import epath

from rae_jax.errors import UserError
from rae_jax.runtime import atomic_files, logs, processes

BEAT = 10.0  # seconds
PATIENCE = 3.5 * BEAT  # for a lock of another machine to move
LOST = 2  # exit status of a run whose workdir was taken over
_SETTLE = {True: 2.0, False: 0.2}  # seconds for two that start at the same time to see each other; remote, local


@contextlib.contextmanager
def hold(workdir, *, beat=BEAT, patience=PATIENCE):
    """Own `workdir`, which is made, until the end. Yields the Lock.

    Raises UserError where another run owns it, or where it cannot be written. Of several processes the first one holds
    it for all.
    """
    path, found, lock = epath.Path(workdir) / "lock.json", None, None
    if jax.process_index() == 0:
        try:
            lock = Lock(path, beat, patience)
        except UserError as error:
            found = error
    if processes.agreed(found is not None):
        found = found or UserError(f"--workdir={workdir} cannot be taken: the first process says why")
    if found is not None:
        raise found
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


class Lock:
    """A lock that is held; a thread shows that its owner lives."""

    def __init__(self, path, beat, patience):
        self._path, self._every = path, beat
        self._mine = {**_self(), "token": secrets.token_hex(8), "beat": 0}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _await_free(path, patience)
            self._write()
            time.sleep(_SETTLE["://" in str(path)])
            theirs = _read(path)
        except OSError as error:
            reason = atomic_files.reason(error)
            raise UserError(
                f"cannot write to --workdir={path.parent} ({reason}): choose a folder you may write to"
            ) from error
        if not self._is_mine(theirs):
            raise _in_use(path, theirs)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lock", daemon=True)
        self._thread.start()

    def release(self):
        """Let others have it."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._is_mine(_read(self._path)):
                self._path.unlink()

    def _is_mine(self, theirs):
        return theirs is not None and theirs.get("token") == self._mine["token"]

    def _write(self):
        atomic_files.write_text(self._path, json.dumps(self._mine) + "\n")

    def _run(self):
        while not self._stop.wait(self._every):
            with contextlib.suppress(Exception):  # a disk that is full, a bucket that is away: errors of many kinds
                theirs = _read(self._path)
                if theirs is not None and not self._is_mine(theirs):
                    # It thought this one dead, which may have been suspended: not another byte is written.
                    logs.say(f"error: {_owner(theirs)} has taken over {self._path.parent}: this run stops at once")
                    os._exit(LOST)
                self._mine["beat"] += 1
                self._write()


def _await_free(path, patience):
    """Return where nobody owns the lock. Raises UserError where somebody does."""
    theirs = _read(path)
    if theirs is None:
        return
    mine = _self()
    if theirs.get("machine") == mine["machine"]:
        if theirs.get("started") == _started(theirs.get("pid")) and theirs.get("pid") is not None:
            raise _in_use(path, theirs)
        logs.say(f"taking over {path.parent} from {_owner(theirs)}, which is gone")
        return
    logs.say(f"{path.parent} was taken by {_owner(theirs)}: watching {patience:.0f} s whether that still runs")
    began = time.monotonic()
    while time.monotonic() - began < patience:
        time.sleep(min(1.0, patience / 10))
        now = _read(path)
        if now is None:
            return
        if now != theirs:
            raise _in_use(path, now)
    logs.say(f"taking over {path.parent}: nothing moved")


def _in_use(path, theirs):
    return UserError(f"--workdir={path.parent} is in use by {_owner(theirs)}: stop that one, or take another --workdir")


def _owner(theirs):
    return f"process {theirs.get('pid')} on {theirs.get('host')} (since {theirs.get('since')})"


def _self():
    pid = os.getpid()
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "machine": _machine(), "pid": pid, "started": _started(pid), "since": since}


def _machine():
    """A word for where process numbers mean the same: this boot of this machine, this container."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()} {secrets.token_hex(8)}"  # nothing tells: processes are watched


def _started(pid):
    """When a process began, in ticks since boot; None where it is gone. A number that is given anew has another one."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError, TypeError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _read(path):
    """What the lock says; None where there is none. A file that says nothing is nobody's."""
    try:
        theirs = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return theirs if isinstance(theirs, dict) else None
