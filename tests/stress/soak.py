"""Kill a run of two stages again and again, and compare its end with a run that was not interrupted, bit by bit.

    python -m tests.stress.soak [--kills=30] [--steps=40] [--seed=0] [--stages=decoder,dit | --toy] [--folder=FOLDER]

The runs are those of the command, without evaluation and report. With --toy they are the training loop with two cheap
stages. SIGKILL and SIGTERM come at random moments: during start-up, between steps, while a checkpoint is written. After
each kill all finished checkpoints must be whole, and the newest step must not be lost. Prints a table; the exit status
is 1 when anything differs. One start takes about ten seconds of a core, with --toy two.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from rae_jax.runtime import checkpoint_manifest, checkpoint_reader
from rae_jax.runtime.command_line import RESTART

from . import harness

MOMENTS = ("start", "step", "step", "writing", "writing")


def main(kills, steps, seed, stages, folder, toy=False):
    """Return [description] of what is wrong in the end."""
    rng, runs = random.Random(seed), harness.Runs(folder)
    flags = [f"--config.stages={tuple(stages)}", *(f"--config.{stage}.train.num_steps={steps}" for stage in stages)]

    def start(workdir):
        if toy:
            return runs.start_toy(workdir, stages, steps)
        return runs.start(workdir, *flags, before=[harness.without_evaluation])

    reference, killed = (Path(folder) / name for name in ("reference", "killed"))
    for workdir in (reference, killed):
        shutil.rmtree(workdir, ignore_errors=True)
    _finish(start(reference))
    wrong, newest, done = [], dict.fromkeys(stages, 0), 0
    print(f"{'kill':>4}  {'signal':8} {'moment':10} {'status':>6}  newest checkpoint", flush=True)
    while done < kills:
        number = rng.choice((signal.SIGKILL, signal.SIGTERM))
        moment = rng.choice(MOMENTS)
        if moment != "start" and sum(newest.values()) >= len(stages) * steps - 2:
            moment = "start"  # no steps are left
        process = start(killed)
        if not _wait_for(moment, process, killed, rng, len(stages) * steps, kills - done, stages):
            process.join()
            if process.exitcode != 0:
                return [*wrong, f"the run failed with status {process.exitcode}: {harness.output(process)[-2000:]}"]
            continue  # the run ended before the kill, which does not count
        os.kill(process.pid, number)
        process.join(300)
        if process.exitcode == 0:
            continue  # it ended before the signal arrived
        done += 1
        wrong += _check(killed, newest, process.exitcode, number)
        steps_saved = " ".join(f"{stage} {newest[stage]}" for stage in stages)
        print(f"{done:>4}  {number.name:8} {moment:10} {process.exitcode!s:>6}  {steps_saved}", flush=True)
    _finish(start(killed))
    return wrong + harness.differences(killed, reference, stages)


def _finish(process):
    process.join()
    if process.exitcode:
        raise SystemExit(f"the run failed with status {process.exitcode}: {harness.output(process)[-2000:]}")


def _wait_for(moment, process, workdir, rng, rows, kills_left, stages):
    """Wait for a random moment of that kind; return False when the process ended first."""
    if moment == "start":
        return not _ended_within(process, rng.uniform(0.0, 6.0))
    before = _rows(workdir, stages)
    share = max(1, round(rng.uniform(0.2, 1.8) * (rows - before) / max(kills_left, 1)))
    reached = harness.wait_for(lambda: _rows(workdir, stages) >= min(before + share, rows - 1), process)
    if reached and moment == "writing":
        pattern = "checkpoints/*/*.orbax-checkpoint-tmp*"
        reached = harness.wait_for(lambda: any(workdir.glob(pattern)), process)
    return reached and not _ended_within(process, rng.uniform(0.0, 0.03))


def _ended_within(process, seconds):
    process.join(seconds)
    return not process.is_alive()


def _rows(workdir, stages):
    return sum(harness.num_rows(workdir, stage) for stage in stages)


def _check(workdir, newest, status, number):
    """Return [description] of what is wrong after a kill, and update `newest`: {stage: step}."""
    wrong = []
    for stage in newest:
        folder = workdir / "checkpoints" / stage
        found = checkpoint_reader.steps(folder)
        wrong += [f"{folder / str(s)}: {why}" for s in found if (why := checkpoint_manifest.damage(folder / str(s)))]
        if max(found, default=0) < newest[stage]:
            wrong.append(f"{stage}: the checkpoint of step {newest[stage]} is lost")
        newest[stage] = max(found, default=0)
    if status not in ((-9,) if number == signal.SIGKILL else (RESTART, -15)):
        wrong.append(f"exit status {status} after {number.name}")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="number of kills")
    parser.add_argument("--steps", type=int, default=40, help="training steps of each stage")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and signals")
    parser.add_argument("--folder", help="holds the runs; default: a new temporary folder")
    parser.add_argument("--stages", default="decoder,dit", help="stages to train, separated by commas")
    parser.add_argument("--toy", action="store_true", help="cheap stages instead of the command's")
    args = parser.parse_args()
    began = time.monotonic()
    folder = args.folder or tempfile.mkdtemp(prefix="soak_")
    stages = ["first", "second"] if args.toy else args.stages.split(",")
    wrong = main(args.kills, args.steps, args.seed, stages, folder, args.toy)
    print("\n".join(wrong) or "parameters, averages, optimisers and metrics at the end are equal to the last bit")
    print(f"{args.kills} kills, {time.monotonic() - began:.0f} s")
    sys.exit(bool(wrong))
