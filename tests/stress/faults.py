"""Cause faults on purpose in real runs, and print a table of each fault and its outcome.

    python -m tests.stress.faults [--only=WORD] [--folder=FOLDER]

Each run is the command with one small stage, the judge. After a fault the same command runs again, and must end like an
undisturbed run, bit by bit, unless the table says otherwise. The exit status is 1 when an outcome is wrong. Faults that
need a mount are skipped without root rights.
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

from rae_jax.runtime import checkpoint_reader
from rae_jax.runtime.command_line import RESTART

from . import harness

STEPS, STAGE = 24, "judge"
FLAGS = ["--config.stages=('judge',)", "--config.judge.widths=(8,)", f"--config.judge.train.num_steps={STEPS}"]
NO_MOUNT = "skipped: mounting needs root rights"


class Faults:
    """Each public method is a row: it causes the fault and returns (outcome in words, whether it is right)."""

    def __init__(self, folder):
        self._folder, self._runs = Path(folder), harness.Runs(folder)
        self._reference = self._fresh("reference")
        status, output = self._finish(self._reference)
        if status != 0:
            raise SystemExit(f"the undisturbed run failed with status {status}: {output}")

    def truncated(self):
        """newest checkpoint truncated"""
        return self._damaged(lambda path: _largest(path).write_bytes(_largest(path).read_bytes()[:-10]))

    def shard(self):
        """a file of the newest checkpoint missing"""
        return self._damaged(lambda path: _largest(path).unlink())

    def metadata(self):
        """metadata of the newest checkpoint garbled"""
        return self._damaged(lambda path: (path / "state" / "_METADATA").write_text("{]"))

    def full(self):
        """disk full for a while (tmpfs of 1 MB)"""
        workdir = self._fresh("full")
        workdir.mkdir()
        if not _mount(workdir, "size=1m"):
            return NO_MOUNT, True
        try:
            process = self._start(workdir, before=_slow_down)
            self._wait_for_rows(process, workdir, 4)
            with (workdir / "ballast").open("wb", buffering=0) as ballast:
                while _write_block(ballast):
                    pass
            harness.wait_for(lambda: "cannot be written" in harness.output(process), process)
            (workdir / "ballast").unlink()
            process.join()
            output = harness.output(process)
            return self._compare(workdir, process.exitcode, output, "cannot be written")
        finally:
            subprocess.run(["umount", workdir], check=True)

    def read_only(self):
        """read-only workdir"""
        workdir = self._fresh("read_only")
        workdir.mkdir()
        if not _mount(workdir, "ro"):
            return NO_MOUNT, True
        try:
            status, output = self._finish(workdir)
        finally:
            subprocess.run(["umount", workdir], check=True)
        return f"status {status}: {_last_line(output)}", _is_one_line(status, output)

    def vanishing(self):
        """data file missing in the middle of an epoch"""
        images = self._folder / "images"
        for number in range(64):
            path = images / str(number % 2) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(path)
        flags = ["--config.data.source=image_folder", f"--config.data.path={images}", "--config.data.num_classes=2"]
        reference, workdir = self._fresh("folder"), self._fresh("vanishing")
        self._finish(reference, *flags)
        process = self._start(workdir, *flags, before=_slow_down)
        self._wait_for_rows(process, workdir, 3)
        (images / "1").rename(images / "moved")
        process.join()
        output = harness.output(process)
        (images / "moved").rename(images / "1")
        status, _ = self._finish(workdir, *flags)
        same = status == 0 and not harness.differences(workdir, reference, [STAGE])
        outcome = f"status {process.exitcode}: {_last_line(output)}; file restored: {_sameness(same)}"
        return outcome, _is_one_line(process.exitcode, output) and same

    def worker(self):
        """a data worker process killed"""
        workdir = self._fresh("worker")
        process = self._start(workdir, "--config.data.num_workers=2", before=_slow_down)
        self._wait_for_rows(process, workdir, 3)
        children = [c for f in Path(f"/proc/{process.pid}/task").glob("*/children") for c in f.read_text().split()]
        workers = [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
        os.kill(workers[-1], signal.SIGKILL)
        process.join()
        output = harness.output(process)
        status, _ = self._finish(workdir)
        same = status == 0 and not harness.differences(workdir, self._reference, [STAGE])
        outcome = f"status {process.exitcode}: {_last_line(output)}; restarted: {_sameness(same)}"
        return outcome, _is_one_line(process.exitcode, output) and same

    def nan(self):
        """NaN in a batch: stop"""
        status, output = self._finish(self._fresh("nan"), before=_nan_images)
        return f"status {status}: {_last_line(output)}", status == 1 and "stopped at step 9," in _last_line(output)

    def nan_skipped(self):
        """NaN in a batch: config.health.skip=1"""
        workdir = self._fresh("skip")
        status, output = self._finish(workdir, "--config.health.skip=1", before=_nan_images)
        line = next((line for line in output.splitlines() if "the update of step 9 is skipped" in line), "")
        return f"status {status}: {line[:160]}", status == 0 and bool(line)

    def clock(self):
        """clock jumping by days, back and forth"""
        workdir = self._fresh("clock")
        status, output = self._finish(workdir, before=_jumping_clock)
        return self._compare(workdir, status, output, "")

    def second(self):
        """second run on the same workdir"""
        workdir = self._fresh("second")
        first = self._start(workdir, before=_slow_down)
        self._wait_for_rows(first, workdir, 3)
        shutil.copy(f"{workdir}.log", f"{workdir}.first.log")
        status, output = self._finish(workdir)
        first.join()
        _, same = self._compare(workdir, first.exitcode, output, "")
        line = next((line for line in output.splitlines() if "in use" in line), _last_line(output))
        return f"status {status}: {line}; first run: {_sameness(same)}", status == 2 and "in use" in output and same

    def devices(self):
        """8 devices -> 4 (fsdp) -> 1"""
        workdir = self._fresh("devices")
        for devices, flags, rows in ((8, ("--config.mesh.fsdp=4",), 6), (4, ("--config.mesh.fsdp=2",), 12)):
            process = self._start(workdir, *flags, devices=devices, before=_slow_down)
            self._wait_for_rows(process, workdir, rows)
            os.kill(process.pid, signal.SIGTERM)
            process.join()
            if process.exitcode != RESTART:
                return f"status {process.exitcode}: {_last_line(harness.output(process))}", False
        status, _ = self._finish(workdir)
        ours, reference = (
            harness.read_state(w / "checkpoints" / STAGE / str(STEPS)) for w in (workdir, self._reference)
        )
        distance = max(float(np.abs(ours[k] - reference[k]).max()) for k in ours if "ema_params" in k)
        return f"status {status}; averaged weights differ from one device's by at most {distance:.1e}", distance < 1e-3

    def _damaged(self, damage):
        """Interrupt a run, call `damage` with the path of its newest checkpoint, and resume it."""
        workdir = self._fresh("damaged")
        process = self._start(workdir, before=_slow_down)
        self._wait_for_rows(process, workdir, 9)
        os.kill(process.pid, signal.SIGTERM)
        process.join()
        folder = workdir / "checkpoints" / STAGE
        damage(folder / str(checkpoint_reader.latest_step(folder)))
        status, output = self._finish(workdir)
        return self._compare(workdir, status, output, "is damaged")

    def _compare(self, workdir, status, output, word):
        """Return (line of the output with `word`, whether the line exists and the run ended like the reference)."""
        line = next((line for line in output.splitlines() if word and word in line), "")
        same = status == 0 and not harness.differences(workdir, self._reference, [STAGE])
        outcome = f"{line.replace(str(self._folder), '')[:150]} {_sameness(same)}".strip()
        return outcome, same and word in output

    def _fresh(self, name):
        workdir = self._folder / name
        shutil.rmtree(workdir, ignore_errors=True)
        Path(f"{workdir}.log").unlink(missing_ok=True)
        return workdir

    def _start(self, workdir, *flags, before=None, devices=1):
        changes = [harness.without_evaluation, *([before] if before else [])]
        return self._runs.start(workdir, *FLAGS, *flags, before=changes, devices=devices)

    def _finish(self, workdir, *flags, before=None):
        process = self._start(workdir, *flags, before=before)
        process.join()
        return process.exitcode, harness.output(process)

    def _wait_for_rows(self, process, workdir, count):
        if not harness.wait_for(lambda: harness.num_rows(workdir, STAGE) >= count, process):
            raise SystemExit(f"the run ended too early: {harness.output(process)[-1000:]}")


def _slow_down():
    """Limit the run to five steps a second, so that there is time to cause a fault."""
    from rae_jax.runtime import logs

    write = logs.Metrics.write

    def write_slowly(self, step, values):
        write(self, step, values)
        time.sleep(0.2)

    logs.Metrics.write = write_slowly


def _nan_images():
    """Replace the images of the ninth batch by NaN."""
    import jax.numpy as jnp

    from rae_jax.training import classifier

    make = classifier.make

    def make_with_nan(**settings):
        init, step = make(**settings)

        def step_with_nan(state, frozen, batch, key):
            factor = jnp.where(state["step"] == 8, jnp.nan, 1.0)
            return step(state, frozen, {**batch, "image": batch["image"] / 255.0 * factor}, key)

        return init, step_with_nan

    classifier.make = make_with_nan


def _jumping_clock():
    """Add a random error of days to the clock; the error changes every three seconds."""
    now = time.time
    time.time = lambda: now() + random.Random(int(time.monotonic() / 3)).uniform(-1e6, 1e6)


def _largest(path):
    return max((path / "state").glob("*/d/*"), key=lambda file: file.stat().st_size)


def _mount(path, options):
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True)
    return done.returncode == 0


def _write_block(file):
    try:
        file.write(bytes(4096))
    except OSError:
        return False
    return True


def _is_one_line(status, output):
    return status == 2 and "Traceback" not in output


def _last_line(output):
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def _sameness(same):
    return "same to the last bit" if same else "DIFFERENT RESULT"


ROWS = ("truncated", "shard", "metadata", "full", "read_only", "vanishing", "worker", "nan", "nan_skipped")
ROWS += ("clock", "second", "devices")


def main(folder, only=""):
    """Print the table; return [name] of the rows with a wrong outcome."""
    faults, wrong = Faults(folder), []
    for name in ROWS:
        if only in name:
            fault = getattr(faults, name)
            outcome, right = fault()
            print(f"{'ok' if right else 'WRONG':5}  {fault.__doc__:46}  {outcome}", flush=True)
            wrong += [] if right else [name]
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"run the rows with this word in their name: {', '.join(ROWS)}")
    parser.add_argument("--folder", help="holds the runs; default: a new temporary folder")
    args = parser.parse_args()
    sys.exit(bool(main(args.folder or tempfile.mkdtemp(prefix="faults_"), args.only)))
