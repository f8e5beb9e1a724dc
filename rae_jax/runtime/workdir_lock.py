"""A lock that allows one run per workdir: WORKDIR/lock.json names its owner.

It holds 'host', 'machine', 'pid' and 'started' of the process, a unique 'token', and 'beat', a counter that the owner's
thread increments. On the same machine the process table shows at once that the owner has ended. A lock of another
machine is stale if its beat does not change while it is watched. No clocks of two machines are compared, and a clock
that jumps has no effect. Locks of the file system are not used, because gs:// has none.
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

BEAT = 10.0  # seconds between two changes of a lock by its owner
STALE_AFTER = 3.5 * BEAT  # seconds without a change after which a lock of another machine is stale
TAKEN_OVER = 2  # exit status of a run whose workdir was taken over
_SETTLE = {True: 2.0, False: 0.2}  # seconds until two runs that start at the same time see each other; remote, local


@contextlib.contextmanager
def hold(workdir, *, beat=BEAT, stale_after=STALE_AFTER):
    """Create `workdir`, and own it until the block ends. Yields the Lock.

    Raises UserError if another run owns it, or if it cannot be written. The first process holds the lock for all.
    """
    path, refused, lock = epath.Path(workdir) / "lock.json", None, None
    if jax.process_index() == 0:
        try:
            lock = Lock(path, beat, stale_after)
        except UserError as error:
            refused = error
    if processes.agreed(refused is not None):
        raise refused or UserError(f"--workdir={workdir} cannot be locked: see the error of the first process")
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


class Lock:
    """A lock that is held; a thread increments its beat."""

    def __init__(self, path, beat, stale_after):
        self._path, self._every = path, beat
        self._mine = {**_self(), "token": secrets.token_hex(8), "beat": 0}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _await_free(path, stale_after)
            self._write()
            time.sleep(_SETTLE["://" in str(path)])
            theirs = _read(path)
        except OSError as error:
            reason = atomic_files.reason(error)
            raise UserError(
                f"cannot write to --workdir={path.parent} ({reason}): choose a folder with write permission"
            ) from error
        if not self._is_mine(theirs):
            raise _in_use(path, theirs)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lock", daemon=True)
        self._thread.start()

    def release(self):
        """Stop the thread and remove the lock."""
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
            with contextlib.suppress(Exception):  # errors of many kinds: a full disk, a bucket that cannot be reached
                theirs = _read(self._path)
                if theirs is not None and not self._is_mine(theirs):
                    # This process was suspended, and its lock became stale. It must write nothing more.
                    folder = self._path.parent
                    logs.say(f"error: {_owner(theirs)} has taken over --workdir={folder}: this run stops now")
                    os._exit(TAKEN_OVER)
                self._mine["beat"] += 1
                self._write()


def _await_free(path, stale_after):
    """Return when no live run owns the lock. Raises UserError if one does."""
    theirs = _read(path)
    if theirs is None:
        return
    mine = _self()
    if theirs.get("machine") == mine["machine"]:
        if theirs.get("started") == _started(theirs.get("pid")) and theirs.get("pid") is not None:
            raise _in_use(path, theirs)
        logs.say(f"taking over --workdir={path.parent} from {_owner(theirs)}, which has ended")
        return
    folder, owner = path.parent, _owner(theirs)
    logs.say(f"--workdir={folder} is locked by {owner}: checking for {stale_after:.0f} s if it still runs")
    began = time.monotonic()
    while time.monotonic() - began < stale_after:
        time.sleep(min(1.0, stale_after / 10))
        now = _read(path)
        if now is None:
            return
        if now != theirs:
            raise _in_use(path, now)
    logs.say(f"taking over --workdir={folder}: its lock did not change")


def _in_use(path, theirs):
    owner = _owner(theirs)
    return UserError(f"--workdir={path.parent} is in use by {owner}: stop that process, or set another --workdir")


def _owner(theirs):
    return f"process {theirs.get('pid')} on {theirs.get('host')} (since {theirs.get('since')})"


def _self():
    pid = os.getpid()
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "machine": _machine(), "pid": pid, "started": _started(pid), "since": since}


def _machine():
    """Return an identifier of the scope of process ids: this boot of this machine, this container."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()} {secrets.token_hex(8)}"  # not Linux: every lock is watched


def _started(pid):
    """Return the start of a process in ticks since boot, which tells reused ids apart; None if it has ended."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError, TypeError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _read(path):
    """Return the content of the lock; None if the file does not exist or holds no JSON object: nobody owns it."""
    try:
        theirs = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return theirs if isinstance(theirs, dict) else None
