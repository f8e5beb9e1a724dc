"""Reproduce the paper's claims at small scale: run the experiments of configs/study/ with several seeds.

    python -m launch.study [--only=width,noise] [--workdir=runs/study] [--size=full] [--seeds=3] [--jobs=2]
                           [--data=PATH] [--report]

Each variant and seed is a run in a workdir of its own, WORKDIR/DATA/EXPERIMENT/VARIANT/seed_N. The same command again
skips finished runs and resumes interrupted ones. The results of all runs go to WORKDIR/DATA: EXPERIMENT.csv and .png,
index.html, results.md and summary.json; --report only writes these. PATH: an image folder or .zip archive; default:
shapes.
"""

import importlib.util
import os
import pathlib
import sys

from absl import app, flags

from configs.study import base
from launch.study import page, plan, pool, work
from rae_jax.errors import UserError
from rae_jax.runtime import atomic_files, command_line


def run(only, workdir, size, seeds, jobs, data, report):
    """Return {name: reason} of the runs that failed. Raises UserError, and KeyboardInterrupt after a signal."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the plots need matplotlib: pip install -e '.[study]'")
    for name in only:
        if name not in plan.STUDIES:
            raise UserError(f"--only={name} cannot work: choose from {', '.join(plan.STUDIES)}")
    label, keys = plan.data_of(data)
    folder = pathlib.Path(workdir).resolve() / (label if size == "full" else f"{label}_{size}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir!r} cannot be used ({atomic_files.reason(error)}): choose another folder"
        ) from error
    chosen, all_of_them = (
        plan.Plan(studies, workdir=folder, data=keys, size=size, seeds=seeds)
        for studies in (only or plan.STUDIES, plan.STUDIES)
    )
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder.parent / "compiled"))
    # Runs that differ in the seed alone share all compiled programs, small ones too.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    failed = {}
    try:
        if not report:
            failed = pool.run(list(chosen.jobs.values()), jobs)
    finally:
        print(f"results: {write(all_of_them, folder)}")
    return failed


def write(planned, folder):
    """Write tables, plots and the page of all finished runs; return the path of the page."""
    found, cpu = {}, {}
    for name, jobs in planned.of.items():
        rows = {key: work.results(planned.jobs[job]) for key, job in jobs.items()}
        found[name] = {key: of for key, of in rows.items() if of is not None}
        cpu[name] = sum(work.cpu_seconds(planned.jobs[job]) for job in jobs.values())
    shared = [job for name, job in planned.jobs.items() if name.startswith("foundations/")]
    cpu["foundations"] = sum(work.cpu_seconds(job) for job in shared)
    cpu = {name: round(seconds) for name, seconds in cpu.items()}
    return page.write(folder, {name: plan.read(name) for name in found}, found, cpu)


def main():
    """Define the flags and run the command."""
    flags.DEFINE_list("only", [], "Experiments to run; default: all.")
    flags.DEFINE_string("workdir", "runs/study", "Folder for runs and results.")
    flags.DEFINE_enum("size", "full", list(base.SIZES), "fast: seconds; full: minutes of a CPU core; large: a GPU.")
    flags.DEFINE_integer("seeds", 3, "Runs of each variant.", lower_bound=1)
    flags.DEFINE_integer("jobs", 2, "Runs at the same time, each on cores of its own.", lower_bound=1)
    flags.DEFINE_string("data", "", "An image folder or .zip archive with a folder for each class; default: shapes.")
    flags.DEFINE_bool("report", False, "Only write the results.")
    app.run(_run_command, flags_parser=command_line.plain_parser)


def _run_command(argv):
    try:
        names = ("only", "workdir", "size", "seeds", "jobs", "data", "report")
        failed = run(**{name: flags.FLAGS[name].value for name in names})
    except UserError as error:
        command_line.fail(str(error))
    except KeyboardInterrupt:
        print("interrupted: the same command resumes the runs", file=sys.stderr)
        sys.exit(command_line.RESTART)
    for name, why in failed.items():
        print(f"error: {name}: {why}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
