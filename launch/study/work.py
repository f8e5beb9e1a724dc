"""Run one job in a process of its own: train or resume, write the weights for other jobs, measure."""

import hashlib
import json
import os
import signal
import sys
import time
import traceback

from rae_jax.config import run_config, scopes
from rae_jax.config.keys import STAGES
from rae_jax.errors import UserError
from rae_jax.runtime import atomic_files
from rae_jax.runtime.command_line import RESTART

MEASURE = 2  # version of the measurements; results of another version are measured again
RESULTS = "study.json"  # in the workdir: the request, and the rows that answer it
ASKED = "asked.json"  # in the workdir: all that the training depends on
CPU = "cpu_seconds.jsonl"  # one line for each process that worked on the job


def run_in_process(job, cores, log):
    """Run the job, write output to the file `log`, and exit with the command's statuses (docs/robustness.md)."""
    if cores:
        os.sched_setaffinity(0, cores)  # before XLA counts them
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.setsid()  # Ctrl-C reaches the parent process alone, which sends SIGTERM
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    signal.signal(signal.SIGTERM, _interrupt)
    status = 1
    try:
        status = _run(job)
    except KeyboardInterrupt:
        status = RESTART
    except Exception:
        traceback.print_exc()
    finally:
        with open(job.workdir / CPU, "a") as file:
            file.write(f"{json.dumps(round(time.process_time(), 2))}\n")
        sys.stdout.flush()
        os._exit(status)


def _interrupt(number, frame):
    raise KeyboardInterrupt


def _run(job):
    from rae_jax.runtime import host_allocator
    from rae_jax.runtime.health import DivergedRun
    from rae_jax.training.loop import InterruptedRun

    host_allocator.keep_freed_memory()
    try:
        perform(job)
    except (UserError, DivergedRun) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except InterruptedRun as stop:
        print(f"{stop}; saved", file=sys.stderr)
        return RESTART
    return 0


def request(job):
    """Return all that the results of a job depend on, in JSON's types."""
    names = ("config", "kind", "vae", "built_on", "measure", "generators", "judge")
    return json.loads(json.dumps({**{name: getattr(job, name) for name in names}, "by": MEASURE}))


def trained_by(job):
    """Return all that the weights of a job depend on, in JSON's types."""
    # The student alone learns the guidance: runs without one do not depend on it.
    stages = set(STAGES) - {"few_step"} | set(job.config.get("stages", ()))
    config = {key: value for key, value in job.config.items() if scopes.of(key) & stages}
    return json.loads(json.dumps({"config": config, "kind": job.kind, "vae": job.vae, "built_on": job.built_on}))


def digest(job):
    """Return a short hash of all that a job's weights depend on."""
    return hashlib.sha256(json.dumps(trained_by(job), sort_keys=True).encode()).hexdigest()[:16]


def results(job):
    """Return [{'step', 'metric', 'value'}] of a job that is done, or None without results for this request."""
    try:
        found = json.loads((job.workdir / RESULTS).read_text())
        return found["rows"] if found["request"] == request(job) else None
    except (OSError, ValueError, KeyError):
        return None


def cpu_seconds(job):
    """Return the CPU seconds of all processes that worked on the job."""
    path = job.workdir / CPU
    return sum(json.loads(line) for line in path.read_text().splitlines()) if path.exists() else 0.0


def perform(job):
    """Train, export and measure. Raises UserError, DivergedRun and InterruptedRun as training does."""
    from launch.study import measure, vae
    from rae_jax import convert
    from rae_jax.cli import train
    from rae_jax.config import checks
    from rae_jax.runtime import sharding

    config, rows = configured(job.config), []
    mesh = sharding.make_mesh(config.mesh)

    def train_and_measure(config, workdir, mesh, evaluator):
        train.run_stages(config, workdir, mesh, evaluator)
        if job.export:
            convert.export(workdir, job.workdir / "weights", config=config)
        rows[:] = measure.rows(job, config, mesh)

    match job.kind:
        case "run":
            checks.check(config, mesh)
            run_config.check(config, job.workdir, *config.stages)
            claim(job)
            train.in_workdir(config.lock(), _path(job.workdir), mesh, train_and_measure)
        case "vae":
            claim(job)
            vae.train(config.lock(), _path(job.workdir), mesh, **job.vae)
        case "image":
            _copy_image(config, job.workdir / "weights")
        case other:
            raise ValueError(f"unknown kind of job {other!r}")
    atomic_files.write_text(
        _path(job.workdir) / RESULTS, json.dumps({"request": request(job), "rows": rows}, indent=1) + "\n"
    )


def claim(job):
    """Mark the workdir as this job's. Raises UserError when it holds a run of other settings or foundations."""
    path, asked = _path(job.workdir) / ASKED, trained_by(job)
    if path.exists() and (job.workdir / "checkpoints").exists() and json.loads(path.read_text()) != asked:
        raise UserError(f"{job.workdir} holds a run with other settings or foundations: remove that folder")
    atomic_files.write_text(path, json.dumps(asked))


def configured(keys):
    """Return configs/small.py with other values of some keys."""
    from configs import small

    config = small.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(keys)
    return config


def _path(path):
    from etils import epath

    return epath.Path(path)


def _copy_image(config, folder):
    """Write sixteen copies of the first training image as a folder of one class."""
    from PIL import Image

    from rae_jax.build import data as build_data

    image = build_data.source(config, "train")[0]["image"]
    (folder / "one").mkdir(parents=True, exist_ok=True)
    for number in range(16):
        Image.fromarray(image).save(folder / "one" / f"{number:02}.png")
