"""What a run says: metrics as JSON lines, to TensorBoard and Weights & Biases, progress on the terminal."""

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

from rae_jax.errors import UserError
from rae_jax.runtime import atomic_files, processes

PLAIN_LINE_EVERY = 10.0  # seconds between progress lines where standard error is not a terminal


class Metrics:
    """Appends to metrics/STAGE.jsonl; lines after `step`, left by a run that went further, are dropped first.

    What cannot be written, as the disk is full or away, is said once and kept for later: training goes on.
    """

    def __init__(self, workdir, stage, *, step, tracker=None):
        self._active = jax.process_index() == 0
        self._stage, self._tracker = stage, tracker
        self._path = epath.Path(workdir) / "metrics" / f"{stage}.jsonl"
        self._tensorboard, self._kept = None, []
        if not self._active:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._rewrite([row for row in read(self._path) if row["step"] <= step])
        self._tensorboard = _tensorboard(epath.Path(workdir) / "tensorboard" / stage)

    def write(self, step, values):
        """One line: `step`, then the numbers by name; what is not finite is left out, as JSON has no word for it."""
        if not self._active:
            return
        values = {name: float(value) for name, value in values.items()}
        row = {"step": step, **{name: value for name, value in values.items() if math.isfinite(value)}}
        try:
            if self._kept:  # what was cut off then ends what can be read
                self._rewrite(read(self._path) + [*self._kept, row])
                say(f"{self._path} can be written again: no line of it is lost")
            else:
                atomic_files.append_text(self._path, json.dumps(row) + "\n")
            self._kept = []
        except Exception as error:  # of many kinds, where a bucket is away
            if not self._kept:
                reason = atomic_files.reason(error)
                say(f"{self._path} cannot be written ({reason}): training goes on, its lines are kept")
            self._kept.append(row)
        if self._tensorboard:
            self._tensorboard.write_scalars(step, values)
        if self._tracker:
            self._tracker.write(self._stage, step, values)

    def lack_evaluation(self, step):
        """Whether there is no line of an evaluation after this step. To be called by all processes."""
        found = [row for row in read(self._path) if row["step"] == step] if self._active else []
        return bool(processes.agreed(not any(key.startswith("eval/") for row in found for key in row)))

    def _rewrite(self, rows):
        atomic_files.write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))


class WandB:
    """A run of Weights & Biases for a workdir, taken up again by the same workdir; a context manager.

    Every metric of a stage is STAGE/NAME over STAGE/step. WANDB_MODE and the other variables of wandb hold. Raises
    UserError where it cannot be begun.
    """

    def __init__(self, project, workdir, keys):
        import wandb

        workdir = epath.Path(workdir)
        words = {"project": project, "name": workdir.name, "id": _run_id(workdir), "resume": "allow"}
        try:
            self._run = wandb.init(**words, config=keys, dir=_local_folder(workdir))
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(f"config.wandb={project!r}: {reason}; WANDB_MODE=offline needs no account") from error
        self._stages = set()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self._run.finish(exit_code=0 if kind is None else 1)

    def write(self, stage, step, values):
        """The numbers by name after that step of a stage."""
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/step", hidden=True)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in values.items()}})


def tracker(project, workdir, keys):
    """Context manager of a WandB in the first process, where there is a project; of None elsewhere."""
    if not project or jax.process_index() != 0:
        return contextlib.nullcontext()
    return WandB(project, workdir, keys)


def _run_id(workdir):
    """The id that WORKDIR/wandb_id.txt keeps; a new one at first."""
    path = workdir / "wandb_id.txt"
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    return path.read_text().strip()


def _local_folder(workdir):
    """Where wandb keeps its own files: in the workdir; in its default place where that is not local."""
    return None if "://" in str(workdir) else str(workdir)


def read(path):
    """The rows of a metrics file; a line cut off by a crash ends it."""
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
    """Steps done, rate and time left: a bar on a terminal, a line every ten seconds elsewhere."""

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
        """`done` of the total are done."""
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
    """A line for the person at the terminal; results go to standard output, this goes to standard error.

    Of several processes the first one speaks; with `everywhere`, each does.
    """
    if everywhere or jax.process_index() == 0:
        with contextlib.suppress(OSError):  # a run does not end because its log's disk is full, or its terminal gone
            print(text, file=sys.stderr, flush=True)


def _tensorboard(folder):
    if importlib.util.find_spec("tensorflow") is None:  # clu's writers need it; it is an extra
        return None
    try:
        from clu import metric_writers
    except ImportError as error:
        say(f"no TensorBoard: {error} (pip install -e '.[tensorboard]' mends it)")
        return None
    return metric_writers.SummaryWriter(str(folder))
