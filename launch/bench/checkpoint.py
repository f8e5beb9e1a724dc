"""How long the loop stands still for a checkpoint, beside how long its write takes.

    python -m launch.bench_checkpoint [--megabytes=500] [--saves=3] [--folder=FOLDER]

The stall is the time that saving keeps the loop, and what the step after it takes longer than usual: its state, which
would be overwritten, is still being read. Prints a line for each save; the last line printed is JSON. On CPU, steps and
write share the cores, so that steps are slower meanwhile; that is printed, too, and is no part of the stall.
"""

import argparse
import json
import os
import statistics
import tempfile
import time

import jax

from rae_jax.runtime import checkpoint, host_allocator

LIMIT = 0.1  # of the write, that the loop may stand still


class _Nowhere:
    """The position of no data."""

    def get_state(self):
        return {"position": 0}


def _timed(function, *arguments):
    began = time.monotonic()
    result = jax.block_until_ready(function(*arguments))
    return result, time.monotonic() - began


def main(megabytes, saves, folder):
    """Returns {'stall', 'write', 'ratio'}: medians in seconds, and the median of their ratios."""
    host_allocator.keep_freed_memory()
    parts = max(1, megabytes // 10)
    # Random, as trained weights nearly are: numbers that are all the same are written in no time, compressed.
    state = {f"kernel{i}": jax.random.normal(jax.random.key(i), (1000, 2500)) for i in range(parts)}
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1.0, state), donate_argnums=0)
    state, _ = _timed(step, state)
    usual, rows = [], []
    with checkpoint.Checkpoints(folder, keep=1) as checkpoints:
        for number in range(saves + 1):  # the first one warms up
            for _ in range(5):
                state, seconds = _timed(step, state)
                usual.append(seconds)
            began = time.monotonic()
            checkpoints.save(number, state, _Nowhere())
            saved = time.monotonic() - began
            state, first = _timed(step, state)
            stall, meanwhile = saved + max(0.0, first - statistics.median(usual)), []
            while not checkpoints.finished:
                state, seconds = _timed(step, state)
                meanwhile.append(seconds)
            write = time.monotonic() - began
            slower = statistics.median(meanwhile or [first]) / statistics.median(usual)
            if number:
                print(f"save {number}: stall {stall:.3f} s, write {write:.2f} s, ratio {stall / write:.3f}; "
                      f"steps meanwhile take {slower:.1f} times as long")  # fmt: skip
                rows.append((stall, write, stall / write))
    stall, write, ratio = (statistics.median(column) for column in zip(*rows, strict=True))
    size = sum(leaf.nbytes for leaf in state.values()) / 1e6
    return {"megabytes": size, "stall": stall, "write": write, "ratio": ratio, "within_limit": ratio < LIMIT}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--folder", default=None, help="for the checkpoints; by default a new one, removed afterwards")
    given = parser.parse_args()
    if given.folder and os.path.exists(given.folder) and os.listdir(given.folder):
        parser.error(f"--folder={given.folder} is not empty: checkpoints of the same steps would not be written")
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(main(given.megabytes, given.saves, given.folder or temporary)))
