"""Facts of the computer on Linux and on macOS, and in containers whose user has no name."""

import errno
import os
import pwd
import resource
import sys
import types

import pytest

from rae_jax.runtime import atomic_files, host, workdir_lock


def test_macos_has_no_affinity_and_counts_memory_in_bytes(monkeypatch):
    monkeypatch.setattr(resource, "getrusage", lambda who: types.SimpleNamespace(ru_maxrss=5))
    assert host.peak_memory() == 5 * 1024 and host.num_cores() == len(os.sched_getaffinity(0))
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert host.peak_memory() == 5 and host.num_cores() == 12


def test_a_machine_without_proc_has_one_name(monkeypatch):
    """Otherwise a restart on the same machine would watch its own lock."""
    real = workdir_lock.Path

    def without_proc(path):
        return real("/nowhere" + str(path)) if str(path).startswith("/proc") else real(path)

    monkeypatch.setattr(workdir_lock, "Path", without_proc)
    names = set()
    for _ in range(2):
        workdir_lock._machine.cache_clear()
        names.add(workdir_lock._machine())
    workdir_lock._machine.cache_clear()
    assert len(names) == 1 and names.pop().strip()
    started = workdir_lock._started(os.getpid())
    assert started is not None and started == workdir_lock._started(os.getpid())
    assert workdir_lock._started(2**22 + 1) is None
    monkeypatch.setenv("PATH", "")  # nor ps
    assert workdir_lock._started(os.getpid()) == "unknown" and workdir_lock._started(2**22 + 1) is None


def test_a_file_s_size_needs_no_name_of_its_owner(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"12345")

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert atomic_files.size(tmp_path / "file") == 5


def test_one_of_many_creates_a_file(tmp_path):
    assert atomic_files.create(tmp_path / "file", "first")
    assert not atomic_files.create(tmp_path / "file", "second")
    assert (tmp_path / "file").read_text() == "first" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError):
        atomic_files.create("/dev/null/file", "text")


def test_a_file_is_created_on_file_systems_without_links(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", refused)
    test_one_of_many_creates_a_file(tmp_path)
