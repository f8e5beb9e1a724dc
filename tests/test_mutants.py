"""The table of tests/stress/mutants.py matches the code; the command shows whether the tests detect each fault."""

import collections
import os
import subprocess
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from stress import mutants


def test_every_fault_can_be_planted():
    """Each fault compiles and changes the code; a fact has at least two; the tests in the table exist."""
    found = mutants.read()
    facts = collections.Counter(mutant.fact for mutant in found)
    assert len(found) >= 60 and min(facts.values()) >= 2
    for mutant in found:
        text = mutants.planted(mutant)
        assert text != (mutants.ROOT / mutant.file).read_text()
        compile(text, mutant.file, "exec")
        for test in mutant.tests:
            name, _, function = test.partition("::")
            assert f"def {function}" in (mutants.ROOT / "tests" / name).read_text(), test


def test_a_fault_that_no_longer_matches_is_named(tmp_path):
    (tmp_path / "file.py").write_text("a = 1\na = 1\n")
    for old in ("a = 1", "b = 1"):
        with pytest.raises(ValueError, match=f"file.py holds . times, not once: {old}"):
            mutants.planted(types.SimpleNamespace(file="file.py", old=old, new="a = 2"), tmp_path)


def _start_a_process_and_wait(file):
    process = subprocess.Popen(["sleep", "1000"])
    file.write_text(f"{os.getpid()} {process.pid}")
    process.wait()


def _runs(pid):
    """Return whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_the_processes_of_tests_are_killed_with_their_own_children(tmp_path):
    children, file = mutants.Children(), tmp_path / "pids"
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(children.run, _start_a_process_and_wait, file)
        while not (file.exists() and len(pids := file.read_text().split()) == 2):
            assert not outcome.done()
            time.sleep(0.02)
        children.kill()
        assert outcome.result() is None
    ends = time.monotonic() + 10  # the system ends the second one a little later
    while any(_runs(pid) for pid in pids) and time.monotonic() < ends:
        time.sleep(0.02)
    assert not any(_runs(pid) for pid in pids)
    assert children.run(_start_a_process_and_wait, file) is None
