"""The paper's claims, reproduced in small: every experiment of configs/study/, or some, with several seeds.

    python -m launch.study [--only=width,noise] [--workdir=runs/study] [--size=full] [--seeds=3] [--jobs=2]
                           [--data=PATH] [--report]

Every variant and seed is a run in a workdir of its own, WORKDIR/DATA/EXPERIMENT/VARIANT/seed_N; what is done is not
done again, and what was interrupted goes on. WORKDIR/DATA gets EXPERIMENT.csv and .png, index.html, results.md and
summary.json of all that is there; --report only writes those. PATH: an image folder or .zip archive, by default shapes.
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
    """Returns {name of a run that failed: why}. Raises UserError, and KeyboardInterrupt after a signal."""
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
            f"--workdir={workdir!r} cannot be used ({atomic_files.reason(error)}): name another folder"
        ) from error
    wanted, whole = (
        plan.Plan(studies, workdir=folder, data=keys, size=size, seeds=seeds)
        for studies in (only or plan.STUDIES, plan.STUDIES)
    )
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder.parent / "compiled"))
    # What one seed has compiled, the next one takes, little things included.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    failed = {}
    try:
        if not report:
            failed = pool.run(list(wanted.jobs.values()), jobs)
    finally:
        print(f"results: {write(whole, folder)}")
    return failed


def write(planned, folder):
    """Write tables, plots and the page from what is done; returns the page's path."""
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
    flags.DEFINE_list("only", [], "Experiments; all by default.")
    flags.DEFINE_string("workdir", "runs/study", "Where runs and results are.")
    flags.DEFINE_enum("size", "full", list(base.SIZES), "fast: seconds; full: minutes of a CPU core; large: a GPU.")
    flags.DEFINE_integer("seeds", 3, "Of each variant.", lower_bound=1)
    flags.DEFINE_integer("jobs", 2, "Runs at once, each on its own cores.", lower_bound=1)
    flags.DEFINE_string("data", "", "An image folder or .zip archive with a folder for each class; by default shapes.")
    flags.DEFINE_bool("report", False, "Only write the results anew.")
    app.run(_run_command, flags_parser=command_line.plain_parser)


def _run_command(argv):
    given = flags.FLAGS
    try:
        names = ("only", "workdir", "size", "seeds", "jobs", "data", "report")
        failed = run(**{name: given[name].value for name in names})
    except UserError as error:
        command_line.fail(str(error))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(command_line.RESTART)
    for name, why in failed.items():
        print(f"error: {name}: {why}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
