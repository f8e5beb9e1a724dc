"""Plant one-line faults in copies of the code, one at a time, and run the tests that must detect them.

    python -m tests.stress.mutants [--only=WORD] [--jobs=2]

mutants.toml lists the faults and the tests for each. A fault is killed when one of its tests fails, and survives when
all pass. Before that, all these tests must pass without a fault. The exit status is 1 when more than `MAX_SURVIVORS`
faults survive, or when the table does not explain a survivor.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_suffix(".toml")
FOLDERS = ("rae_jax", "configs", "launch", "tests")
MAX_SURVIVORS = 2
LIMIT = 300  # seconds for the tests of one fault, which may have made a loop endless
PROCESSES = multiprocessing.get_context("forkserver")


class Mutant(NamedTuple):
    """A fault: in `file`, the text `old`, which must occur once, becomes `new`. `why` explains a known survivor."""

    fact: str
    tests: tuple
    file: str
    old: str
    new: str
    why: str = ""


def read():
    """Return all faults, in the order of the table."""
    facts = tomllib.loads(TABLE.read_text())["fact"]
    return [Mutant(fact["name"], tuple(fact["tests"]), *row) for fact in facts for row in fact["mutants"]]


def planted(mutant, root=ROOT):
    """Return the text of the file with the fault. Raises ValueError when the code has changed and the row has not."""
    text = (root / mutant.file).read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} holds {text.count(mutant.old)} times, not once: {mutant.old}")
    return text.replace(mutant.old, mutant.new)


class Children:
    """Processes that run tests, each in a process group with the processes that its tests start."""

    def __init__(self):
        self._lock, self._running, self._killed = threading.Lock(), set(), False

    def run(self, target, *args, limit=LIMIT):
        """Call `target(*args)` in a new process. Return its exit status, or None after `limit` seconds or `kill`."""
        with self._lock:
            if self._killed:
                return None
            process = PROCESSES.Process(target=_in_own_group, args=(target, args))
            process.start()
            self._running.add(process)
        process.join(limit)
        with self._lock:
            self._running.discard(process)
            timed_out = process.is_alive()
            if timed_out:
                _kill_group(process)
        process.join()
        return None if timed_out or self._killed else process.exitcode

    def kill(self):
        """Kill all processes; later calls of `run` start none."""
        with self._lock:
            self._killed = True
            for process in self._running:
                _kill_group(process)


def _in_own_group(target, args):
    os.setpgid(0, 0)
    target(*args)


def _kill_group(process):
    with contextlib.suppress(ProcessLookupError):  # it may have no group yet
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _passes(children, copy, tests, *, limit=LIMIT):
    """Return whether all tests pass in the copy within `limit` seconds. Raises RuntimeError if pytest itself fails."""
    status = children.run(_run_tests, copy, tests, _output(copy), limit=limit)
    if status not in (None, 0, 1):
        raise RuntimeError(f"pytest failed with status {status}: {_output(copy).read_text()[-3000:]}")
    return status == 0


def _output(copy):
    return copy.parent / "output.txt"


def _run_tests(copy, tests, output):
    """Run tests of the copy in a process that has imported other packages, but nothing of this project."""
    os.chdir(copy)
    sys.path[:] = [str(copy), *(path for path in sys.path if path not in ("", str(ROOT)))]
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]))


def _try(mutant, copies, children):
    """Plant the fault in a free copy; return (whether it survives, seconds)."""
    copy, began = copies.get(), time.monotonic()
    path = copy / mutant.file
    intact = path.read_text()
    try:
        path.write_text(planted(mutant, copy))
        return _passes(children, copy, mutant.tests), time.monotonic() - began
    finally:
        path.write_text(intact)
        copies.put(copy)


def main(mutants, jobs):
    """Print what happens to each fault; return whether few enough survive, and all survivors are explained."""
    began, children = time.monotonic(), Children()
    with tempfile.TemporaryDirectory(prefix="mutants_") as folder, ThreadPoolExecutor(jobs) as pool:
        try:
            survivors = _survivors(mutants, jobs, Path(folder), pool, children)
        except BaseException:  # with Ctrl-C and SIGTERM
            pool.shutdown(wait=False, cancel_futures=True)
            children.kill()
            raise
    minutes = (time.monotonic() - began) / 60
    killed = len(mutants) - len(survivors)
    print(f"{len(mutants)} planted, {killed} killed, {len(survivors)} survive, {minutes:.1f} min")
    for mutant in survivors:
        print(f"survives: {mutant.fact}: {mutant.file}: {mutant.new.strip()} ({mutant.why or 'unexplained'})")
    return len(survivors) <= MAX_SURVIVORS and all(mutant.why for mutant in survivors)


def _survivors(mutants, jobs, folder, pool, children):
    """Return the faults that no test detects. Raises SystemExit when the tests fail without a fault."""
    # For the server that all test processes are forked from. No bytecode is kept, because a fault may have the length
    # and the time stamp of the original.
    os.environ.update({"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"})
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    PROCESSES.set_forkserver_preload(["jax", "flax.linen", "optax.contrib", "orbax.checkpoint", "grain"])
    folders = [_copy(folder / str(number) / ROOT.name) for number in range(jobs)]
    files = sorted({test for mutant in mutants for test in mutant.tests})
    parts = [files[number::jobs] for number in range(jobs)]
    # Without the names of tests all tests would run.
    intact = pool.map(lambda copy, tests: not tests or _passes(children, copy, tests, limit=None), folders, parts)
    failed = [_output(copy).read_text()[-3000:] for copy, passes in zip(folders, intact, strict=True) if not passes]
    if failed:
        raise SystemExit("\n".join([*failed, "the tests fail without a fault: fix this first"]))
    copies, survivors = queue.Queue(), []
    for copy in folders:
        copies.put(copy)
    outcomes = pool.map(lambda mutant: _try(mutant, copies, children), mutants)
    for number, mutant, (survives, seconds) in zip(itertools.count(1), mutants, outcomes):
        outcome = f"{'SURVIVES' if survives else 'killed'}, {seconds:.0f} s"
        print(f"[{number} of {len(mutants)}] {outcome}: {mutant.file}: {mutant.new.strip()}", flush=True)
        if survives:
            survivors.append(mutant)
    return survivors


def _copy(copy):
    """Copy the checkout; link the pages and the folder `shared` next to it, which tests read."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    for name in ("README.md", "docs", "colab"):
        (copy / name).symlink_to(ROOT / name)
    if (ROOT.parent / "shared").exists():
        (copy.parent / "shared").symlink_to(ROOT.parent / "shared")
    return copy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="plant the faults with this word in their fact or file")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="faults tried at the same time")
    args = parser.parse_args()
    chosen = [mutant for mutant in read() if args.only in f"{mutant.fact} {mutant.file}"]
    if not chosen:
        parser.error(f"--only={args.only} matches no fact and no file of {TABLE.name}: choose another word")
    if args.jobs < 1:
        parser.error(f"--jobs={args.jobs} cannot work: choose 1 or more")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(0 if main(chosen, args.jobs) else 1)
