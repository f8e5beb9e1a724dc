"""Start runs in processes of their own that soak.py and faults.py kill or disturb, and compare finished runs.

All processes are forked from a server that has imported JAX once, and share one compilation cache: a start takes a few
seconds. Modules of this folder import each other relatively, because it is `tests.stress` for `python -m` and `stress`
for pytest.
"""

import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np

CONFIG = Path(__file__).with_name("tiny_run.py")
PARTS = ("encoder", "statistics")  # not trained in these runs: their weights are random


class Runs:
    """Start runs of tiny_run.py; `folder` holds the compilation cache and the frozen weights."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        os.environ.update(
            {
                "JAX_PLATFORMS": "cpu",
                "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
        )
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["rae_jax.main", f"{__package__}.tiny_run", f"{__package__}.toy_stage"])

    def start(self, workdir, *arguments, devices=1, before=()):
        """Start a run after calling each function of `before` in its process. WORKDIR.log gets its output."""
        if not (self.folder / "weights").exists():
            writer = self._processes.Process(target=_write_weights, args=(self.folder / "weights",))
            writer.start()
            writer.join()
        weights = [f"--config.{part}.weights={self.folder / 'weights'}" for part in PARTS]
        argv = ["main", f"--config={CONFIG}", f"--workdir={workdir}", *weights, *arguments]
        log = Path(f"{workdir}.log")
        process = self._processes.Process(target=_run, args=(argv, log, devices, before))
        process.log = log
        process.start()
        return process

    def start_toy(self, workdir, stages, num_steps):
        """Start a run of toy stages: the training loop, checkpoints and logs of the command, with cheap steps."""
        process = self._processes.Process(target=_run_toy, args=(workdir, stages, num_steps, Path(f"{workdir}.log")))
        process.log = Path(f"{workdir}.log")
        process.start()
        return process


def without_evaluation():
    """Skip evaluation and report; for `before` of Runs.start."""
    from rae_jax.build import part_weights
    from rae_jax.cli import results
    from rae_jax.ui import report

    part_weights.load_all = part_weights.check_available = results.measure = lambda *_: {"seconds": 0.0}
    report.write_report = lambda workdir: None


def output(process):
    """Return the standard output and standard error of a run so far."""
    return process.log.read_text(errors="replace") if process.log.exists() else ""


def num_rows(workdir, stage):
    """Return the number of lines in the metrics of a stage."""
    path = Path(workdir) / "metrics" / f"{stage}.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(condition, process, limit=3000):
    """Poll `condition`; return True when it is true, False when the process ends before."""
    began = time.monotonic()
    while not condition():
        if not process.is_alive():
            return False
        if time.monotonic() - began > limit:
            raise SystemExit(f"no progress for {limit} s; last output:\n{output(process)[-2000:]}")
        time.sleep(0.003)
    return True


def differences(ours, theirs, stages):
    """Return [description] of each array and metric that differs between two finished workdirs, without perf/."""
    from rae_jax.runtime import checkpoint_reader, logs

    found = []
    for stage in stages:
        states = []
        for workdir in (ours, theirs):
            folder = Path(workdir) / "checkpoints" / stage
            states.append(read_state(folder / str(checkpoint_reader.latest_step(folder))))
        if states[0].keys() != states[1].keys():
            found.append(f"{stage}: the states have different keys")
            continue
        left, right = states
        found += [f"{stage}: {key} differs" for key in left if left[key].tobytes() != right[key].tobytes()]
        rows = [logs.read(Path(workdir) / "metrics" / f"{stage}.jsonl") for workdir in (ours, theirs)]
        if without_perf(rows[0]) != without_perf(rows[1]):
            found.append(f"{stage}: metrics differ")
    return found


def without_perf(rows):
    """Return rows of metrics without the perf/ numbers, which depend on the machine."""
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


def read_state(path):
    """Return {name: array}: the whole state in a checkpoint."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path / "state").item_metadata
        numpy_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
        tree = checkpointer.restore(path / "state", args=ocp.args.PyTreeRestore(restore_args=numpy_arrays))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves}


def _redirect_output(log):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))


def _run_toy(workdir, stages, num_steps, log):
    """Train the toy stages in the run's own process; exit with the command's statuses."""
    _redirect_output(log)
    from etils import epath

    from rae_jax.runtime import command_line, health, workdir_lock
    from rae_jax.training.loop import InterruptedRun

    from . import toy_stage

    try:
        with workdir_lock.hold(workdir):
            for name in stages:
                options = {"health_settings": health.Settings(heartbeat=0.05), "on_error": "continue"}
                toy_stage.run(epath.Path(workdir), num_steps, name=name, keep=2, **options)
    except InterruptedRun:
        sys.exit(command_line.RESTART)


def _run(argv, log, devices, before):
    """Run the command in the run's own process."""
    _redirect_output(log)
    flags = "--xla_backend_optimization_level=1"
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
    from rae_jax import main

    for change in before:
        change()
    sys.argv = argv
    main.main()


def _write_weights(folder):
    import jax

    from rae_jax.build import part_weights
    from rae_jax.weights import safetensors_tree

    from . import tiny_run

    config = tiny_run.get_config()
    for part in PARTS:
        rng = np.random.default_rng(0)
        shapes = part_weights.shapes(config, part)
        scale = 0.0 if part == "statistics" else 0.05
        tree = jax.tree.map(lambda leaf, r=rng, s=scale: (s * r.normal(size=leaf.shape)).astype(np.float32), shapes)
        if part == "statistics":
            tree["var"] = tree["var"] + 1.0
        safetensors_tree.write(folder / f"{part}.safetensors", tree)
