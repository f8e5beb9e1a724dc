"""One stage of a tiny run without a command: trained, resumed, and on eight devices."""

import shutil

import jax
import numpy as np
import pytest
from conftest import random_like, uncached
from stress import harness

from rae_jax.build import part_weights, stages
from rae_jax.runtime import logs, sharding
from rae_jax.training.loop import fit
from rae_jax.weights import safetensors_tree


def write_weights(config, folder, parts, scale):
    """Write random weights of these parts of the config to a folder."""
    for part in parts:
        tree = random_like(part_weights.shapes(config, part), seed=0, scale=scale)
        safetensors_tree.write(folder / f"{part}.safetensors", tree)


def train(config, stage, workdir, sizes=(1, 1, 1)):
    """Train or resume a stage on a mesh of these sizes; return its rows of metrics without times."""
    config.mesh.update(dict(zip(sharding.AXES, sizes, strict=True)))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[: np.prod(sizes)])
    made = stages.stage(config, stage, workdir, mesh)
    options = {"log_every": 1, "checkpoint_every": 2, "keep": 9}
    fit(made, workdir=workdir, mesh=mesh, key=jax.random.key(0), **options)
    return harness.without_perf(logs.read(workdir / "metrics" / f"{stage}.jsonl"))


def check_resumed(config, stage, rows, workdir, folder):
    """Check that a run resumed in `folder` from step 2 ends as the whole run in `workdir`, to the last bit."""
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copytree(workdir / "checkpoints" / stage / "2", folder / "checkpoints" / stage / "2")
    found = train(config.copy_and_resolve_references(), stage, folder)
    assert found == [row for row in rows if row["step"] > 2]
    last = str(rows[-1]["step"])
    ours, theirs = (harness.read_state(path / "checkpoints" / stage / last) for path in (folder, workdir))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def check_eight_devices(config, stage, rows, folder, rel):
    """Check that the metrics of a run on eight devices are those of one."""
    config = config.copy_and_resolve_references()
    config.unroll = True  # see tests/stress/collectives.py
    with uncached():
        found = train(config, stage, folder, (2, 2, 2))
    for ours, theirs in zip(found, rows, strict=True):
        for key in theirs:
            assert ours[key] == pytest.approx(theirs[key], rel=rel, abs=1e-6), (theirs["step"], key)
