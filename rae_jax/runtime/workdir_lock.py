"""A lock that allows one run per workdir: WORKDIR/lock.json names its owner.

It holds 'host', 'machine', 'pid' and 'started' of the process, a unique 'token', and 'beat', a counter that the owner's
thread increments. On the same machine the process table shows at once that the owner has ended. A lock of another
machine is stale if its beat does not change while it is watched. No clocks of two machines are compared, and a clock
that jumps has no effect. Locks of the file system are not used, because gs:// has none: a lock is a file that only one
process can create.
"""

import contextlib
import datetime
import functools
import json
import os
import secrets
import socket
import subprocess
import threading
import time
import uuid
from pathlib import Path

import jax
from etils import epath

from rae_jax.errors import UserError
from rae_jax.runtime import atomic_files, logs, processes

BEAT = 10.0  # seconds between two changes of a lock by its owner
STALE_AFTER = 3.5 * BEAT  # seconds without a change after which a lock of another machine is stale
TAKEN_OVER = 2  # exit status of a run whose workdir was taken over
_LEFT_BEHIND = 5.0  # seconds after which the guard of a takeover, which takes milliseconds, belongs to a killed process


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
        self._mine = {**this_process(), "token": secrets.token_hex(8), "beat": 0}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while not atomic_files.create(path, self._text()):
                stale = _await_stale(path, stale_after)
                if stale is not None:
                    _remove(path, stale)
        except OSError as error:
            reason = atomic_files.reason(error)
            raise UserError(
                f"cannot write to --workdir={path.parent} ({reason}): choose a folder with write permission"
            ) from error
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

    def _text(self):
        return json.dumps(self._mine) + "\n"

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
                atomic_files.write_text(self._path, self._text())


def _await_stale(path, stale_after):
    """Return the text of the lock once its owner has ended; None without a lock. Raises UserError for a live owner."""
    text = _text_of(path)
    if text is None:
        return None
    theirs, mine, folder = _parsed(text), this_process(), path.parent
    if theirs.get("machine") == mine["machine"]:
        if theirs.get("started") == _started(theirs.get("pid")) and theirs.get("pid") is not None:
            raise _in_use(path, theirs)
        logs.say(f"taking over --workdir={folder} from {_owner(theirs)}, which has ended")
        return text
    owner = _owner(theirs) if theirs else "an unknown process"
    logs.say(f"--workdir={folder} is locked by {owner}: checking for {stale_after:.0f} s if it still runs")
    began = time.monotonic()
    while time.monotonic() - began < stale_after:
        time.sleep(min(1.0, stale_after / 10))
        now = _text_of(path)
        if now is None:
            return None
        if now != text:
            raise _in_use(path, _parsed(now))
    logs.say(f"taking over --workdir={folder}: its lock did not change")
    return text


def _remove(path, stale):
    """Remove a stale lock, unless another process has done it, and has perhaps created its own lock already."""
    guard, mine = path.with_name("lock.takeover.json"), secrets.token_hex(8)
    began, seen = time.monotonic(), None
    while not atomic_files.create(guard, mine):
        theirs = _text_of(guard)
        if theirs != seen:
            began, seen = time.monotonic(), theirs
        elif time.monotonic() - began > _LEFT_BEHIND:
            guard.unlink(missing_ok=True)
        time.sleep(0.1)
    try:
        if _text_of(path) == stale:
            path.unlink(missing_ok=True)
    finally:
        guard.unlink(missing_ok=True)


def has_ended(theirs):
    """Return whether the process of `this_process()` has ended; False if it is not known, as of another machine."""
    theirs = theirs if isinstance(theirs, dict) else {}
    return theirs.get("machine") == _machine() and theirs.get("started") != _started(theirs.get("pid"))


def _in_use(path, theirs):
    owner = _owner(theirs)
    return UserError(f"--workdir={path.parent} is in use by {owner}: stop that process, or set another --workdir")


def _owner(theirs):
    return f"process {theirs.get('pid')} on {theirs.get('host')} (since {theirs.get('since')})"


def this_process():
    """Return a dict that names this process among all processes of all machines."""
    pid = os.getpid()
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "machine": _machine(), "pid": pid, "started": _started(pid), "since": since}


@functools.cache
def _machine():
    """Return an identifier of the scope of process ids: this boot of this machine, this container."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    with contextlib.suppress(OSError):  # macOS
        boot = subprocess.run(["sysctl", "-n", "kern.bootsessionuuid"], capture_output=True, text=True, check=False)
        if boot.returncode == 0:
            return boot.stdout.strip()
    return f"{socket.gethostname()} {uuid.getnode()}"


def _started(pid):
    """Return the start of a process, which tells reused ids apart; None if the process has ended."""
    if not isinstance(pid, int):
        return None
    if not Path("/proc/self/stat").exists():  # macOS
        try:
            found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
            return found.stdout.strip() or None
        except OSError:  # no ps: at least whether it runs
            return "unknown" if _runs(pid) else None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def _text_of(path):
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _parsed(text):
    """Return the content of a lock; {} if it is no JSON object: nobody owns it."""
    try:
        theirs = json.loads(text)
    except ValueError:
        return {}
    return theirs if isinstance(theirs, dict) else {}


def _read(path):
    """Return the content of the lock; None if the file does not exist."""
    text = _text_of(path)
    return None if text is None else _parsed(text)
