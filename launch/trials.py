"""Runs of the command in processes of their own, to be killed and hindered: what soak.py and faults.py share.

They come from a server that has imported everything once, and compile into one cache: a start takes a few seconds.
"""

import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
PARTS = ("encoder", "statistics")


class Trials:
    """Starts runs of launch/tiny.py; `folder` keeps the cache and the frozen weights."""

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
        self._processes.set_forkserver_preload(["rae_jax.main", "launch.tiny", "launch.toy"])

    def start(self, workdir, *arguments, devices=1, before=None):
        """Begin a run; `before` is called in its process first. What it says goes to WORKDIR.log."""
        if not (self.folder / "weights").exists():
            writer = self._processes.Process(target=_write_weights, args=(self.folder / "weights",))
            writer.start()
            writer.join()
        weights = [f"--config.{part}.weights={self.folder / 'weights'}" for part in PARTS]
        argv = ["main", f"--config={ROOT / 'launch' / 'tiny.py'}", f"--workdir={workdir}", *weights, *arguments]
        log = Path(f"{workdir}.log")
        process = self._processes.Process(target=_run, args=(argv, log, devices, before))
        process.log = log
        process.start()
        return process

    def start_toy(self, workdir, stages, num_steps):
        """Begin a run of toy stages, which is the loop and all that is around it, and steps that cost nothing."""
        process = self._processes.Process(target=_run_toy, args=(workdir, stages, num_steps, Path(f"{workdir}.log")))
        process.log = Path(f"{workdir}.log")
        process.start()
        return process


def without_evaluation():
    """A run's `before`: it ends with its last stage."""
    from rae_jax.build import parts
    from rae_jax.cli import modes
    from rae_jax.ui import report

    parts.load = parts.find = modes._measure = lambda *_: {"seconds": 0.0}
    report.write_report = lambda workdir: None


def said(process):
    """What a run has written to standard error and output."""
    return process.log.read_text(errors="replace") if process.log.exists() else ""


def num_rows(workdir, stage):
    """Lines of a stage's metrics."""
    path = Path(workdir) / "metrics" / f"{stage}.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(condition, process, limit=3000):
    """Look every few milliseconds; whether it came true before the process ended."""
    began = time.monotonic()
    while not condition():
        if not process.is_alive():
            return False
        if time.monotonic() - began > limit:
            raise SystemExit(f"nothing happened for {limit} s:\n{said(process)[-2000:]}")
        time.sleep(0.003)
    return True


def differences(ours, theirs, stages):
    """What differs between two finished workdirs, in words: arrays of the final states, numbers of the metrics.

    What depends on the clock (perf/) is left out.
    """
    from rae_jax.runtime import checkpoint, logs

    found = []
    for stage in stages:
        states = []
        for workdir in (ours, theirs):
            folder = Path(workdir) / "checkpoints" / stage
            states.append(read_state(folder / str(checkpoint.latest_step(folder))))
        if states[0].keys() != states[1].keys():
            found.append(f"{stage}: other entries")
            continue
        found += [f"{stage}: {key}" for key in states[0] if states[0][key].tobytes() != states[1][key].tobytes()]
        rows = [logs.read(Path(workdir) / "metrics" / f"{stage}.jsonl") for workdir in (ours, theirs)]
        plain = [[{k: v for k, v in row.items() if not k.startswith("perf/")} for row in part] for part in rows]
        if plain[0] != plain[1]:
            found.append(f"{stage}: metrics")
    return found


def read_state(path):
    """{name: array} of a whole checkpoint's state."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path / "state").item_metadata
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
        tree = checkpointer.restore(path / "state", args=ocp.args.PyTreeRestore(restore_args=how))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves}


def _say_to(log):
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))


def _run_toy(workdir, stages, num_steps, log):
    """In the run's own process, with the exit statuses of the command."""
    _say_to(log)
    from etils import epath

    from launch import toy
    from rae_jax.runtime import command_line, health, workdir_lock
    from rae_jax.training.loop import InterruptedRun

    try:
        with workdir_lock.hold(workdir):
            for name in stages:
                care = health.Settings(heartbeat=0.05)
                toy.run(epath.Path(workdir), num_steps, name=name, keep=2, care=care, on_error="continue")
    except InterruptedRun:
        sys.exit(command_line.RESTART)


def _run(argv, log, devices, before):
    """In the run's own process."""
    _say_to(log)
    flags = "--xla_backend_optimization_level=1"
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
    from rae_jax import main

    if before is not None:
        before()
    sys.argv = argv
    main.main()


def _write_weights(folder):
    import jax

    from launch import tiny
    from rae_jax.build import stages
    from rae_jax.weights import safetensors_tree

    config = tiny.get_config()
    for part in PARTS:
        rng = np.random.default_rng(0)
        shapes = stages.part_shapes(config, part)
        scale = 0.0 if part == "statistics" else 0.05
        tree = jax.tree.map(lambda leaf, r=rng, s=scale: (s * r.normal(size=leaf.shape)).astype(np.float32), shapes)
        if part == "statistics":
            tree["var"] = tree["var"] + 1.0
        safetensors_tree.write(folder / f"{part}.safetensors", tree)
