"""What goes wrong on bad days, done to real runs on purpose: prints a table of what was done and what came of it.

    python -m launch.faults [--only=WORD] [--folder=FOLDER]

Each run is the command with one small stage, the judge's. After each fault the same command is run again, and must end
as a run that was left alone, bit by bit, unless the table says otherwise. The exit status is 1 where something is not
as it should be. What cannot be tried here (mounting takes root) is said.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from launch import trials
from rae_jax.runtime import checkpoint

STEPS, STAGE = 24, "judge"
FLAGS = ["--config.stages=('judge',)", "--config.judge.widths=(8,)", f"--config.judge.train.num_steps={STEPS}"]


class Faults:
    """Each method is a row: it does the harm, and returns (what came of it, whether that is right)."""

    def __init__(self, folder):
        self._folder, self._runs = Path(folder), trials.Trials(folder)
        self._alone = self._fresh("alone")
        status, said = self._finish(self._alone)
        if status != 0:
            raise SystemExit(f"the run that was left alone ended with status {status}: {said}")

    def truncated(self):
        """newest checkpoint truncated"""
        return self._damaged(lambda path: _largest(path).write_bytes(_largest(path).read_bytes()[:-10]))

    def shard(self):
        """one file of it missing"""
        return self._damaged(lambda path: _largest(path).unlink())

    def metadata(self):
        """its metadata garbled"""
        return self._damaged(lambda path: (path / "state" / "_METADATA").write_text("{]"))

    def full(self):
        """disk full for a while (tmpfs of 1 MB)"""
        workdir = self._fresh("full")
        workdir.mkdir()
        if not _mount(workdir, "size=1m"):
            return "not tried: mounting takes root", True
        try:
            process = self._start(workdir, before=_slowly)
            self._rows(process, workdir, 4)
            with (workdir / "ballast").open("wb", buffering=0) as ballast:
                while _written(ballast):
                    pass
            self._said(process, "cannot be written")
            (workdir / "ballast").unlink()
            process.join()
            said = trials.said(process)
            return self._verdict(workdir, process.exitcode, said, "cannot be written")
        finally:
            subprocess.run(["umount", workdir], check=True)

    def read_only(self):
        """workdir that cannot be written"""
        workdir = self._fresh("read_only")
        workdir.mkdir()
        if not _mount(workdir, "ro"):
            return "not tried: mounting takes root", True
        try:
            status, said = self._finish(workdir)
        finally:
            subprocess.run(["umount", workdir], check=True)
        return f"status {status}: {_last(said)}", status == 2 and "Traceback" not in said

    def vanishing(self):
        """data file vanishing mid-epoch"""
        images = self._folder / "images"
        for number in range(64):
            path = images / str(number % 2) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(path)
        flags = ["--config.data.source=image_folder", f"--config.data.path={images}", "--config.data.num_classes=2"]
        alone, workdir = self._fresh("folder"), self._fresh("vanishing")
        self._finish(alone, *flags)
        process = self._start(workdir, *flags, before=_slowly)
        self._rows(process, workdir, 3)
        (images / "1").rename(images / "gone")
        process.join()
        said = trials.said(process)
        (images / "gone").rename(images / "1")
        right = process.exitcode == 2 and "Traceback" not in said
        status, _ = self._finish(workdir, *flags)
        same = status == 0 and not trials.differences(workdir, alone, [STAGE])
        return f"status {process.exitcode}: {_last(said)}; put back: {_sameness(same)}", right and same

    def worker(self):
        """a process that reads data killed"""
        workdir = self._fresh("worker")
        flags = ["--config.data.num_workers=2"]
        process = self._start(workdir, *flags, before=_slowly)
        self._rows(process, workdir, 3)
        children = [c for f in Path(f"/proc/{process.pid}/task").glob("*/children") for c in f.read_text().split()]
        workers = [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
        os.kill(workers[-1], signal.SIGKILL)
        process.join()
        said = trials.said(process)
        status, _ = self._finish(workdir)
        same = status == 0 and not trials.differences(workdir, self._alone, [STAGE])
        right = process.exitcode == 2 and "Traceback" not in said
        return f"status {process.exitcode}: {_last(said)}; again: {_sameness(same)}", right and same

    def nan(self):
        """NaN in a batch: stop"""
        status, said = self._finish(self._fresh("nan"), before=_nan)
        return f"status {status}: {_last(said)}", status == 1 and "stopped at step 9" in said

    def nan_skipped(self):
        """NaN in a batch: config.health.skip=1"""
        status, said = self._finish(self._fresh("skip"), "--config.health.skip=1", before=_nan)
        line = next((line for line in said.splitlines() if "left out" in line), "")
        return f"status {status}: {line[:160]}", status == 0 and "step 9 is left out" in line

    def clock(self):
        """clock jumping by days, back and forth"""
        workdir = self._fresh("clock")
        status, said = self._finish(workdir, before=_jump)
        return self._verdict(workdir, status, said, "")

    def second(self):
        """second run on the same workdir"""
        workdir = self._fresh("second")
        first = self._start(workdir, before=_slowly)
        self._rows(first, workdir, 3)
        shutil.copy(f"{workdir}.log", f"{workdir}.first.log")
        status, said = self._finish(workdir)
        first.join()
        _, same = self._verdict(workdir, first.exitcode, said, "")
        line = next((line for line in said.splitlines() if "in use" in line), _last(said))
        return f"status {status}: {line}; the first: {_sameness(same)}", status == 2 and "in use" in said and same

    def devices(self):
        """8 devices -> 4 (fsdp) -> 1"""
        workdir = self._fresh("devices")
        for devices, flags, rows in ((8, ("--config.mesh.fsdp=4",), 6), (4, ("--config.mesh.fsdp=2",), 12)):
            process = self._start(workdir, *flags, devices=devices, before=_slowly)
            self._rows(process, workdir, rows)
            os.kill(process.pid, signal.SIGTERM)
            process.join()
            if process.exitcode != 75:
                return f"status {process.exitcode}: {_last(trials.said(process))}", False
        status, said = self._finish(workdir)
        states = [trials.read_state(w / "checkpoints" / STAGE / str(STEPS)) for w in (workdir, self._alone)]
        far = max(float(np.abs(states[0][k] - states[1][k]).max()) for k in states[0] if "ema_params" in k)
        return f"status {status}; averaged weights differ by at most {far:.1e} from one device's", far < 1e-3

    def _damaged(self, damage):
        workdir = self._fresh("damaged")
        process = self._start(workdir, before=_slowly)
        self._rows(process, workdir, 9)
        os.kill(process.pid, signal.SIGTERM)
        process.join()
        folder = workdir / "checkpoints" / STAGE
        damage(folder / str(checkpoint.latest_step(folder)))
        status, said = self._finish(workdir)
        return self._verdict(workdir, status, said, "is damaged")

    def _verdict(self, workdir, status, said, word):
        """What was said with that word, and whether the run ended as the one that was left alone."""
        line = next((line for line in said.splitlines() if word and word in line), "")
        same = status == 0 and not trials.differences(workdir, self._alone, [STAGE])
        return f"{line.replace(str(self._folder), '')[:150]} {_sameness(same)}".strip(), same and (word in said)

    def _fresh(self, name):
        workdir = self._folder / name
        shutil.rmtree(workdir, ignore_errors=True)
        Path(f"{workdir}.log").unlink(missing_ok=True)
        return workdir

    def _start(self, workdir, *flags, before=None, devices=1):
        how = _Both(trials.without_evaluation, before) if before else trials.without_evaluation
        return self._runs.start(workdir, *FLAGS, *flags, before=how, devices=devices)

    def _finish(self, workdir, *flags, before=None):
        process = self._start(workdir, *flags, before=before)
        process.join()
        return process.exitcode, trials.said(process)

    def _rows(self, process, workdir, count):
        if not trials.wait_for(lambda: trials.num_rows(workdir, STAGE) >= count, process):
            raise SystemExit(f"it ended early: {trials.said(process)[-1000:]}")

    def _said(self, process, word):
        trials.wait_for(lambda: word in trials.said(process), process)


class _Both:
    def __init__(self, *functions):
        self._functions = functions

    def __call__(self):
        for function in self._functions:
            function()


def _slowly():
    """Five steps a second, so that there is time to do harm."""
    from rae_jax.runtime import logs

    write = logs.Metrics.write

    def write_slowly(self, step, values):
        write(self, step, values)
        time.sleep(0.2)

    logs.Metrics.write = write_slowly


def _nan():
    """Images that are not numbers, in the ninth batch."""
    import jax.numpy as jnp

    from rae_jax.build import models
    from rae_jax.training import classifier

    make = classifier.make

    def made(**how):
        init, step = make(**how)

        def with_nan(state, frozen, batch, key):
            image = batch["image"] / 255.0
            bad = jnp.where(state["step"] == 8, jnp.nan, 1.0)
            return step(state, frozen, {**batch, "image": image * bad}, key)

        return init, with_nan

    models.stage_judge.make = made


def _jump():
    """The clock is off by days, every three seconds by others."""
    now = time.time
    time.time = lambda: now() + random.Random(int(time.monotonic() / 3)).uniform(-1e6, 1e6)


def _largest(path):
    return max((path / "state").glob("*/d/*"), key=lambda file: file.stat().st_size)


def _mount(path, options):
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True)
    return done.returncode == 0


def _written(file):
    try:
        file.write(bytes(4096))
    except OSError:
        return False
    return True


def _last(said):
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def _sameness(same):
    return "ends the same to the last bit" if same else "ENDS OTHERWISE"


ROWS = ("truncated", "shard", "metadata", "full", "read_only", "vanishing", "worker", "nan", "nan_skipped")
ROWS += ("clock", "second", "devices")


def main(folder, only=""):
    """Prints the table; returns the rows that are not as they should be."""
    faults, wrong = Faults(folder), []
    for name in ROWS:
        if only in name:
            fault = getattr(faults, name)
            outcome, right = fault()
            print(f"{'ok' if right else 'WRONG':5}  {fault.__doc__:40}  {outcome}", flush=True)
            wrong += [] if right else [name]
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"rows with this in their name: {', '.join(ROWS)}")
    parser.add_argument("--folder", default=None, help="for the runs; by default a new one")
    given = parser.parse_args()
    sys.exit(bool(main(given.folder or tempfile.mkdtemp(prefix="faults_"), given.only)))
