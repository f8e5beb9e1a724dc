"""Measure how long the training loop stalls for a checkpoint, compared with the time to write it.

    python -m launch.bench.checkpoint [--megabytes=500] [--saves=3] [--folder=FOLDER]

The stall is the time in `save`, plus the delay of the next step, which must not overwrite the state before it is
copied. On CPU, steps and the write share the cores: the slowdown of steps during the write is printed, but does not
count as stall. Prints a line for each save; the last line printed is one JSON object.
"""

import os
import statistics
import tempfile

import jax

from launch.bench import harness
from rae_jax.runtime import checkpoint, host_allocator

LIMIT = 0.1  # largest stall, as a part of the write


def main():
    """Parse the command line and print the medians."""
    parser = harness.parser(__doc__)
    parser.add_argument("--megabytes", type=int, default=500, help="size of the state")
    parser.add_argument("--saves", type=int, default=3, help="number of measured saves")
    parser.add_argument("--folder", help="empty folder for the checkpoints; default: a new temporary folder")
    args = parser.parse_args()
    if args.folder and os.path.exists(args.folder) and os.listdir(args.folder):
        parser.error(f"--folder={args.folder} is not empty: choose another folder")
    with tempfile.TemporaryDirectory() as temporary:
        harness.print_json(measure(args.megabytes, args.saves, args.folder or temporary))


def measure(megabytes, saves, folder):
    """Return {'stall', 'write', 'ratio', ...}: medians in seconds, and the median of their ratios."""
    host_allocator.keep_freed_memory()
    # Random numbers, as in trained weights: equal numbers would compress to nothing and be written at once.
    parts = max(1, megabytes // 10)
    state = {f"kernel{i}": jax.random.normal(jax.random.key(i), (1000, 2500)) for i in range(parts)}
    compiled = jax.jit(lambda state: jax.tree.map(lambda x: x + 1.0, state), donate_argnums=0)

    def step(state):
        return jax.block_until_ready(compiled(state))

    state = step(state)
    usual, rows = [], []
    with checkpoint.Checkpoints(folder, keep=1) as checkpoints:
        for number in range(saves + 1):  # the first save is a warm-up
            for _ in range(5):
                state, seconds = harness.timed(step, state)
                usual.append(seconds.wall)
            state, stall, write, slowdown = _save(checkpoints, number, step, state, statistics.median(usual))
            if number:
                rows.append((stall, write, stall / write))
                times = f"stall {stall:.3f} s, write {write:.2f} s, ratio {stall / write:.3f}"
                print(f"save {number}: {times}; steps during the write take {slowdown:.1f} times as long")
    stall, write, ratio = (statistics.median(column) for column in zip(*rows, strict=True))
    size = sum(leaf.nbytes for leaf in state.values()) / 1e6
    return {"megabytes": size, "stall": stall, "write": write, "ratio": ratio, "within_limit": ratio < LIMIT}


def _save(checkpoints, number, step, state, usual):
    """Save, and step until the checkpoint is written; return (state, stall, write, slowdown of steps meanwhile)."""

    def save_and_wait(state):
        _, saving = harness.timed(checkpoints.save, number, state, harness.NoData())
        state, first = harness.timed(step, state)
        during = []
        while not checkpoints.finished:
            state, seconds = harness.timed(step, state)
            during.append(seconds.wall)
        return state, saving.wall + max(0.0, first.wall - usual), statistics.median(during or [first.wall]) / usual

    (state, stall, slowdown), write = harness.timed(save_and_wait, state)
    return state, stall, write.wall, slowdown


if __name__ == "__main__":
    main()
