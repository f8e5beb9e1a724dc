"""Faults of one line, planted one after the other: the tests have to see each.

    python -m tests.stress.mutants [--only=WORD] [--jobs=2]

The faults are in mutants.toml. Each is planted in a copy of this checkout, where the tests that are named for it run;
it is killed where one of them fails, and survives where all pass. First all these tests have to pass without any. The
exit status is 1 where more than `MOST` survive, or one that nobody has explained.
"""

import argparse
import itertools
import multiprocessing
import os
import queue
import shutil
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_suffix(".toml")
FOLDERS = ("rae_jax", "configs", "launch", "tests")
MOST = 2  # that may survive
LIMIT = 300  # seconds of the tests of one fault: one that makes a loop endless is killed
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
    """All of them, in the table's order."""
    facts = tomllib.loads(TABLE.read_text())["fact"]
    return [Mutant(fact["name"], tuple(fact["tests"]), *row) for fact in facts for row in fact["mutants"]]


def planted(mutant, root=ROOT):
    """The file's text with the fault. Raises ValueError where it cannot be planted: the code has changed."""
    text = (root / mutant.file).read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} holds {text.count(mutant.old)} times, not once: {mutant.old}")
    return text.replace(mutant.old, mutant.new)


def _passes(copy, tests):
    """Whether all tests pass there. Raises RuntimeError where pytest itself fails: a fault has to compile."""
    said = copy.parent / "said.txt"
    process = PROCESSES.Process(target=_run, args=(copy, tests, said))
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
        return False
    if process.exitcode not in (0, 1):
        raise RuntimeError(f"pytest ended with status {process.exitcode}: {said.read_text()[-3000:]}")
    return process.exitcode == 0


def _run(copy, tests, said):
    """In a process of its own, which has imported what others have written, and nothing of ours."""
    os.chdir(copy)
    sys.path[:] = [str(copy), *(path for path in sys.path if path not in ("", str(ROOT)))]
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]))


def _try(mutant, copies):
    """(Whether it survives, seconds)."""
    copy, began = copies.get(), time.monotonic()
    path = copy / mutant.file
    whole = path.read_text()
    try:
        path.write_text(planted(mutant, copy))
        return _passes(copy, mutant.tests), time.monotonic() - began
    finally:
        path.write_text(whole)
        copies.put(copy)


def main(mutants, jobs):
    """Prints what became of each; returns whether it is as it should be."""
    began, copies = time.monotonic(), queue.Queue()
    with tempfile.TemporaryDirectory(prefix="mutants_") as folder, ThreadPoolExecutor(jobs) as pool:
        # Of the server that all tests are forked from, which imports JAX. A fault may be as long as the line was, and
        # come within the same second: no bytecode is kept.
        os.environ.update({"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"})
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        PROCESSES.set_forkserver_preload(["jax", "flax.linen", "optax.contrib", "orbax.checkpoint", "grain"])
        folders = [_copy(Path(folder) / str(number) / ROOT.name) for number in range(jobs)]
        files = sorted({test for mutant in mutants for test in mutant.tests})
        if not all(pool.map(_passes, folders, [files[number::jobs] for number in range(jobs)])):
            raise SystemExit("the tests fail without a fault: see `bash launch/test.sh`")
        for copy in folders:
            copies.put(copy)
        survivors = []
        for number, mutant, (survives, seconds) in zip(
            itertools.count(1), mutants, pool.map(lambda m: _try(m, copies), mutants)
        ):
            word = "SURVIVES" if survives else "killed"
            print(
                f"[{number} of {len(mutants)}] {word}, {seconds:.0f} s: {mutant.file}: {mutant.new.strip()}", flush=True
            )
            if survives:
                survivors.append(mutant)
    minutes = (time.monotonic() - began) / 60
    print(
        f"{len(mutants)} planted, {len(mutants) - len(survivors)} killed, {len(survivors)} survive, {minutes:.1f} min"
    )
    for mutant in survivors:
        print(f"survives: {mutant.fact}: {mutant.file}: {mutant.new.strip()} ({mutant.why or 'nobody knows why'})")
    return len(survivors) <= MOST and all(mutant.why for mutant in survivors)


def _copy(copy):
    """The checkout, with what lies beside it within reach."""
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
    parser.add_argument("--only", default="", help="faults with this word in their fact or file")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    chosen = [mutant for mutant in read() if given.only in f"{mutant.fact} {mutant.file}"]
    if not chosen:
        parser.error(f"--only={given.only} is in no fact and no file of {TABLE.name}: choose a word that is")
    if given.jobs < 1:
        parser.error(f"--jobs={given.jobs} cannot work: choose 1 or more")
    sys.exit(0 if main(chosen, given.jobs) else 1)
