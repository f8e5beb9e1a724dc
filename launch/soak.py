"""A run of two stages, killed again and again, must end as one that was left alone: bit by bit.

    python -m launch.soak [--kills=30] [--steps=40] [--seed=0] [--stages=decoder,dit | --toy] [--folder=FOLDER]

By the command itself; only what comes after the last stage, evaluation and report, is left out. With --toy, by the loop
and all that is around it, but with two stages (parameters, averages, Adam) whose steps cost next to nothing. SIGKILL
and SIGTERM at random moments: while it starts, while it steps, while a checkpoint is being written. After every kill
all finished checkpoints are whole, and none that was there is lost but for newer ones. Prints a table; the exit status
is 1 where anything differs. A start takes about ten seconds of one core's time, of a toy two.
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

from launch import trials
from rae_jax.runtime import checkpoint, checkpoint_manifest

MOMENTS = ("start", "step", "step", "writing", "writing")
RESTART = 75


def main(kills, steps, seed, stages, folder, toy=False):
    """Returns what differs in the end, in words."""
    rng, runs = random.Random(seed), trials.Trials(folder)
    flags = [f"--config.stages={tuple(stages)}", *(f"--config.{stage}.train.num_steps={steps}" for stage in stages)]

    def start(workdir):
        if toy:
            return runs.start_toy(workdir, stages, steps)
        return runs.start(workdir, *flags, before=trials.without_evaluation)

    def finish(workdir):
        process = start(workdir)
        process.join()
        if process.exitcode:
            raise SystemExit(f"{workdir} ended with status {process.exitcode}: {trials.said(process)[-2000:]}")

    alone, killed = (Path(folder) / name for name in ("alone", "killed"))
    for workdir in (alone, killed):
        shutil.rmtree(workdir, ignore_errors=True)
    finish(alone)
    wrong, newest, done = [], dict.fromkeys(stages, 0), 0
    print(f"{'kill':>4}  {'signal':8} {'moment':10} {'status':>6}  newest checkpoint", flush=True)
    while done < kills:
        number = rng.choice((signal.SIGKILL, signal.SIGTERM))
        moment = rng.choice(MOMENTS)
        if moment != "start" and sum(newest.values()) >= len(stages) * steps - 2:
            moment = "start"  # nothing is left to step
        process = start(killed)
        if not _await(moment, process, killed, rng, len(stages) * steps, kills - done, stages):
            process.join()
            if process.exitcode != 0:
                return [*wrong, f"it ended by itself with status {process.exitcode}: {trials.said(process)[-2000:]}"]
            continue  # it was faster: a kill that did not happen does not count
        os.kill(process.pid, number)
        process.join(300)
        done += 1
        wrong += _check(killed, newest, process.exitcode, number)
        place = " ".join(f"{stage} {newest[stage]}" for stage in stages)
        print(f"{done:>4}  {number.name:8} {moment:10} {process.exitcode!s:>6}  {place}", flush=True)
    finish(killed)
    return wrong + [f"differs: {what}" for what in trials.differences(killed, alone, stages)]


def _await(moment, process, workdir, rng, rows, left, stages):
    """Until a random moment of that kind; False where the process ended first."""
    if moment == "start":
        return not _ended_within(process, rng.uniform(0.0, 6.0))
    before = _rows(workdir, stages)
    share = max(1, round(rng.uniform(0.2, 1.8) * (rows - before) / max(left, 1)))
    reached = trials.wait_for(lambda: _rows(workdir, stages) >= min(before + share, rows - 1), process)
    if reached and moment == "writing":
        pattern = "checkpoints/*/*.orbax-checkpoint-tmp*"
        reached = trials.wait_for(lambda: any(workdir.glob(pattern)), process)
    return reached and not _ended_within(process, rng.uniform(0.0, 0.03))


def _ended_within(process, seconds):
    process.join(seconds)
    return not process.is_alive()


def _rows(workdir, stages):
    return sum(trials.num_rows(workdir, stage) for stage in stages)


def _check(workdir, newest, status, number):
    """What is wrong after a kill; `newest` is brought up to date."""
    wrong = []
    for stage in newest:
        folder = workdir / "checkpoints" / stage
        found = checkpoint.steps(folder)
        wrong += [f"{folder / str(s)}: {why}" for s in found if (why := checkpoint_manifest.damage(folder / str(s)))]
        if max(found, default=0) < newest[stage]:
            wrong.append(f"the checkpoint of step {newest[stage]} of {stage} is lost")
        newest[stage] = max(found, default=0)
    if status not in ((-9,) if number == signal.SIGKILL else (RESTART, -15, 0)):
        wrong.append(f"{number.name} ended it with status {status}")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("kills", 30), ("steps", 40), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", default=None, help="for the runs; by default a new one")
    parser.add_argument("--stages", default="decoder,dit")
    parser.add_argument("--toy", action="store_true")
    given = parser.parse_args()
    began = time.monotonic()
    folder = given.folder or tempfile.mkdtemp(prefix="soak_")
    stages = ["first", "second"] if given.toy else given.stages.split(",")
    found = main(given.kills, given.steps, given.seed, stages, folder, given.toy)
    print("\n".join(found) or "final parameters, averages, optimisers and metrics are the same to the last bit")
    print(f"{given.kills} kills, {time.monotonic() - began:.0f} s")
    sys.exit(bool(found))
