"""Output of a run: metrics to JSON lines, TensorBoard and Weights & Biases; progress to the terminal."""

import contextlib
import importlib.util
import json
import math
import secrets
import sys
import time

import jax
from etils import epath
from tqdm import tqdm

from rae_jax.errors import UserError, one_line
from rae_jax.runtime import atomic_files, processes, remote_lines

PLAIN_LINE_EVERY = 10.0  # seconds between progress lines if standard error is not a terminal


class Metrics:
    """Writer of metrics/STAGE.jsonl; it first removes the lines after `step`, which a longer run has left.

    If the file cannot be written (a full disk, a lost mount), it reports this once, keeps the lines, and writes them
    later.
    """

    def __init__(self, workdir, stage, *, step, tracker=None):
        self._active = jax.process_index() == 0
        self._stage, self._tracker = stage, tracker
        self._path = epath.Path(workdir) / "metrics" / f"{stage}.jsonl"
        self._tensorboard, self._remote, self._kept = None, None, []
        if not self._active:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for row in read(self._path) if row["step"] <= step]
        self._rewrite(rows)
        if "://" in str(self._path):
            self._remote = remote_lines.RemoteLines(self._path, map(json.dumps, rows), say)
        self._tensorboard = _tensorboard(epath.Path(workdir) / "tensorboard" / stage)

    def write(self, step, values):
        """Append one line: `step`, then the numbers by name. Numbers that are not finite are omitted: JSON has none."""
        if not self._active:
            return
        values = {name: float(value) for name, value in values.items()}
        row = {"step": step, **{name: value for name, value in values.items() if math.isfinite(value)}}
        if self._remote:
            self._remote.append(json.dumps(row))
        else:
            self._append(row)
        if self._tensorboard:
            self._tensorboard.write_scalars(step, values)
        if self._tracker:
            self._tracker.write(self._stage, step, values)

    def _append(self, row):
        try:
            if self._kept:  # a truncated line ends the readable rows
                self._rewrite(read(self._path) + [*self._kept, row])
                say(f"{self._path} can be written again: no line is lost")
            else:
                atomic_files.append_text(self._path, json.dumps(row) + "\n")
            self._kept = []
        except Exception as error:  # of many kinds, if a bucket cannot be reached
            if not self._kept:
                reason = atomic_files.reason(error)
                say(f"{self._path} cannot be written ({reason}): training continues, the lines are kept")
            self._kept.append(row)

    def flush(self):
        """Return when all lines are written, or could not be written."""
        if self._active and self._remote:
            self._remote.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._active and self._remote:
            self._remote.close()

    def _rewrite(self, rows):
        atomic_files.write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))


def lacks_evaluation(workdir, stage, step):
    """Return whether the evaluation after a step of a stage has no line. All processes must call it."""
    path = epath.Path(workdir) / "metrics" / f"{stage}.jsonl"
    found = [row for row in read(path) if row["step"] == step] if processes.is_first() else []
    return bool(processes.agreed(not any(key.startswith("eval/") for row in found for key in row)))


class WandB:
    """A run of Weights & Biases for a workdir, which the same workdir resumes; a context manager.

    Every metric of a stage is logged as STAGE/NAME over STAGE/step. WANDB_MODE and the other variables of wandb apply.
    Raises UserError if the run cannot start.
    """

    def __init__(self, project, workdir, values):
        import wandb

        workdir = epath.Path(workdir)
        settings = {"project": project, "name": workdir.name, "id": _run_id(workdir), "resume": "allow"}
        try:
            self._run = wandb.init(**settings, config=values, dir=_local_folder(workdir))
        except wandb.Error as error:
            raise UserError(
                f"config.wandb={project!r}: {one_line(error)}; WANDB_MODE=offline needs no account"
            ) from error
        self._stages = set()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self._run.finish(exit_code=0 if kind is None else 1)

    def write(self, stage, step, values):
        """Log the numbers by name after a step of a stage."""
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/step", hidden=True)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in values.items()}})


def tracker(project, workdir, values):
    """Return a WandB, a context manager, in the first process if a project is set; otherwise a context of None."""
    if not project or jax.process_index() != 0:
        return contextlib.nullcontext()
    return WandB(project, workdir, values)


def _run_id(workdir):
    """Return the id in WORKDIR/wandb_id.txt; create it if the file does not exist."""
    path = workdir / "wandb_id.txt"
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    return path.read_text().strip()


def _local_folder(workdir):
    """Return the folder of wandb's own files: the workdir if it is local; otherwise None, wandb's default."""
    return None if "://" in str(workdir) else str(workdir)


def read(path):
    """Return the rows of a metrics file, up to the first line that a crash truncated."""
    path = epath.Path(path)
    rows = []
    for line in path.read_bytes().decode(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError):
            break
    return rows


class Progress:
    """Progress in steps, rate and time left: a bar on a terminal; otherwise a line every ten seconds."""

    def __init__(self, name, *, total, start=0, unit="step"):
        self._show = jax.process_index() == 0
        self._name, self._total, self._start, self._unit = name, total, start, unit
        self._done, self._printed = start, start
        self._began = self._said = time.monotonic()
        self._bar = None
        if self._show and sys.stderr.isatty():
            self._bar = tqdm(desc=name, total=total, initial=start, unit=unit, dynamic_ncols=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._bar:
            self._bar.close()
        elif self._show and self._done > self._printed:
            self._line()

    def update(self, done, note=""):
        """Show that `done` steps of the total are done."""
        self._done = done
        if self._bar:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._show and time.monotonic() - self._said > PLAIN_LINE_EVERY:
            self._line(note)

    def _line(self, note=""):
        self._printed, self._said = self._done, time.monotonic()
        rate = (self._done - self._start) / max(time.monotonic() - self._began, 1e-9)
        left = f", {tqdm.format_interval((self._total - self._done) / rate)} left" if rate else ""
        say(f"{self._name}: {self._done}/{self._total} {self._unit}s, {rate:.2f}/s{left}  {note}".rstrip())


def say(text, *, everywhere=False):
    """Print a line for the user to standard error; results go to standard output.

    The first process prints it; with `everywhere`, every process does.
    """
    if everywhere or jax.process_index() == 0:
        with contextlib.suppress(OSError):  # a full disk or a closed terminal does not end a run
            print(text, file=sys.stderr, flush=True)


def _tensorboard(folder):
    if importlib.util.find_spec("tensorflow") is None:  # an extra, which clu's writers need
        return None
    try:
        from clu import metric_writers
    except ImportError as error:
        say(f"no TensorBoard summaries ({error}): pip install -e '.[tensorboard]' adds them")
        return None
    return metric_writers.SummaryWriter(str(folder))
