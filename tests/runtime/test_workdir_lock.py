"""One run per workdir, and what becomes of the locks of the dead, by no clock."""

import concurrent.futures
import json
import os
import random
import threading
import time

import pytest
from etils import epath

from rae_jax.errors import UserError
from rae_jax.runtime import workdir_lock


def _write(path, **changes):
    theirs = {**workdir_lock.this_process(), "token": "theirs", "beat": 0, **changes}
    path.write_text(json.dumps(theirs))
    return theirs


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path) / "lock.json"


def test_the_second_run_is_refused_until_the_first_ends(path):
    with workdir_lock.hold(path.parent):
        with (
            pytest.raises(
                UserError, match=f"is in use by process {os.getpid()} on .*: stop that process, or set another"
            ),
            workdir_lock.hold(path.parent),
        ):
            pass
        assert path.exists()  # the first one's stays
    assert not path.exists()
    with workdir_lock.hold(path.parent):
        pass


@pytest.mark.parametrize("changes", [{"pid": 2**22 + 1}, {"started": 1}])
def test_the_lock_of_a_process_that_is_gone_is_taken_at_once(path, capfd, changes):
    """Also where its number is another process's now."""
    _write(path, **changes)
    began = time.monotonic()
    with workdir_lock.hold(path.parent):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < 5 and "which has ended" in capfd.readouterr().err


def test_a_lock_of_another_machine_is_watched(path, capfd):
    theirs = _write(path, machine="another", host="elsewhere")
    stop = threading.Event()

    def beat():
        while not stop.wait(0.05):
            theirs["beat"] += 1
            path.with_suffix(".new").write_text(json.dumps(theirs))
            path.with_suffix(".new").replace(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with (
            pytest.raises(UserError, match="in use by process .* on elsewhere"),
            workdir_lock.hold(path.parent, stale_after=30),
        ):
            pass
    finally:
        stop.set()
        thread.join()
    with workdir_lock.hold(path.parent, stale_after=0.3):  # now it stands still
        assert json.loads(path.read_text())["token"] != "theirs"
    assert "its lock did not change" in capfd.readouterr().err


def test_no_clock_matters(path, monkeypatch):
    """Whatever wall-clock time does, a lock that is held is held and a stale one is stale."""
    times = iter(range(10**9, 0, -(10**7)))
    monkeypatch.setattr(time, "time", lambda: float(next(times)))
    _write(path, started=1)
    with (
        workdir_lock.hold(path.parent, beat=0.02),
        pytest.raises(UserError, match="in use"),
        workdir_lock.hold(path.parent),
    ):
        pass


def test_the_owner_shows_that_it_lives(path):
    with workdir_lock.hold(path.parent, beat=0.02):
        began = time.monotonic()
        while json.loads(path.read_text())["beat"] < 3:
            assert time.monotonic() - began < 30
            time.sleep(0.01)


@pytest.mark.parametrize("garbage", ["", "{", "[]", '{"pid": "x", "machine": null}'])
def test_a_garbled_lock_is_nobodys(path, garbage):
    path.write_text(garbage)
    with workdir_lock.hold(path.parent, stale_after=0.2):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_workdir_that_cannot_be_written_is_named():
    with pytest.raises(UserError, match="cannot write to --workdir=/dev/null/run"), workdir_lock.hold("/dev/null/run"):
        pass


@pytest.mark.parametrize("left", [{}, {"started": 1}, {"machine": "another", "host": "elsewhere"}])
def test_of_many_starts_at_the_same_time_one_gets_the_workdir(path, left, monkeypatch):
    """One start gets the workdir, also if all find the lock of a run that has ended and some are slow."""
    if left:
        _write(path, **left)
    create = workdir_lock.atomic_files.create

    def slowly(file, text):
        time.sleep(random.random() * 0.2)
        return create(file, text)

    monkeypatch.setattr(workdir_lock.atomic_files, "create", slowly)

    def start(number):
        try:
            return workdir_lock.Lock(path, 10.0, 0.3)
        except UserError:
            return None

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        locks = [lock for lock in pool.map(start, range(8)) if lock is not None]
    assert len(locks) == 1 and json.loads(path.read_text())["token"] == locks[0]._mine["token"]
    locks[0].release()
    assert not list(path.parent.iterdir())


def test_the_guard_of_a_killed_takeover_does_not_stay(path, monkeypatch):
    monkeypatch.setattr(workdir_lock, "_LEFT_BEHIND", 0.2)
    _write(path, started=1)
    path.with_name("lock.takeover.json").write_text("{}")
    with workdir_lock.hold(path.parent):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not list(path.parent.iterdir())
