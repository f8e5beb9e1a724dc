"""Training of RAEv2's network by its recipe: learning, interrupted and resumed, on one device and on eight."""

import shutil

import jax
import numpy as np
import pytest
from conftest import random_like, tiny, uncached
from etils import epath
from stress import harness

from rae_jax.build import part_weights, stages
from rae_jax.runtime import logs, sharding
from rae_jax.training.loop import fit
from rae_jax.weights import safetensors_tree

STEPS = 6


def _config(folder):
    """A tiny run with all that is RAEv2's: tokens, base output, loss, Muon for all matrices, a decay that ends."""
    config = tiny()
    config.stages, config.encoder.weights, config.statistics.weights = ("dit",), str(folder), "none"
    config.dit.update({"conditioning": "in_context", "depth": 2, "base_depth": 1, "qk_norm": True, "num_heads": 2})
    config.dit.update({"prediction": "data_in_velocity", "time_tokens": 2, "label_tokens": 3})
    config.dit.train.update({"optimizer": "muon_all", "warmup_steps": 0, "decay_start": 2, "decay_end": 4})
    config.dit.train.update({"num_steps": STEPS, "more_ema_decays": (), "learning_rate": 2e-3, "decay": "linear"})
    safetensors_tree.write(
        folder / "encoder.safetensors", random_like(part_weights.shapes(config, "encoder"), seed=0, scale=0.3)
    )
    return config


def _train(config, workdir, sizes=(1, 1, 1)):
    config.mesh.update(dict(zip(sharding.AXES, sizes, strict=True)))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[: np.prod(sizes)])
    stage = stages.stage(config, "dit", workdir, mesh)
    options = {"log_every": 1, "checkpoint_every": 2, "keep": 9}
    fit(stage, workdir=workdir, mesh=mesh, key=jax.random.key(0), **options)
    return harness.without_perf(logs.read(workdir / "metrics" / "dit.jsonl"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(config, rows of metrics, workdir) of a run that nothing interrupts."""
    folder = epath.Path(tmp_path_factory.mktemp("raev2"))
    config = _config(folder)
    return config, _train(config, folder / "whole"), folder / "whole"


def test_the_losses_of_both_outputs_are_logged(whole):
    _, rows, _ = whole
    assert len(rows) == STEPS
    for row in rows:
        assert row["loss"] == pytest.approx(row["full_loss"] + row["base_loss"], rel=1e-6)
    assert rows[-1]["full_loss"] != rows[-1]["base_loss"]  # both outputs begin at zero


def test_a_resumed_run_is_the_same_to_the_last_bit(whole, tmp_path):
    config, rows, workdir = whole
    first = config.copy_and_resolve_references()
    folder = epath.Path(tmp_path) / "parts"
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copytree(workdir / "checkpoints" / "dit" / "2", folder / "checkpoints" / "dit" / "2")
    found = _train(first, folder)
    assert found == [row for row in rows if row["step"] > 2]
    ours, theirs = (harness.read_state(path / "checkpoints" / "dit" / str(STEPS)) for path in (folder, workdir))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow
def test_eight_devices_are_one(whole, tmp_path):
    config, rows, _ = whole
    config = config.copy_and_resolve_references()
    config.unroll = True  # see tests/stress/collectives.py
    with uncached():
        found = _train(config, epath.Path(tmp_path) / "eight", (2, 2, 2))
    for ours, theirs in zip(found, rows, strict=True):
        for key in theirs:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6), (theirs["step"], key)
