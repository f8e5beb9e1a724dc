"""The loop on one device and on eight simulated devices: the same losses at every step."""

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

PARTS = ("encoder", "statistics")  # whose weights the stages take


# A step on several meshes, and all that it changes, is compared in profiling/test_compile_ahead.py and
# training/test_decoder_step.py.
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["decoder", "dit"])
def test_meshes_agree(tmp_path, stage):
    # With an encoder that has hardly been trained, all tokens are nearly equal: the norms of the discriminator's heads
    # divide rounding by their small spread, and trajectories are 1e-4 to 8e-3 apart after two updates.
    weights = epath.Path(tmp_path) / "weights"
    weights.mkdir()
    trees = {part: random_like(part_weights.shapes(tiny(), part), seed=0, scale=0.3) for part in PARTS}
    trees["statistics"]["var"] = np.square(trees["statistics"]["var"]) + 0.5
    for part, tree in trees.items():
        safetensors_tree.write(weights / f"{part}.safetensors", tree)
    losses = {}
    for name, sizes in {"one": (1, 1, 1), "eight": (2, 4, 1)}.items():
        config = tiny()
        config.stages = (stage,)
        config.dit.train.optimizer = "muon"  # the one that computes on whole matrices
        config.unroll = True  # see tests/stress/collectives.py
        config.mesh.update(dict(zip(sharding.AXES, sizes, strict=True)))
        for part in PARTS:
            config[part].weights = str(weights)
        mesh = sharding.make_mesh(config.mesh, jax.devices()[: np.prod(sizes)])
        workdir = epath.Path(tmp_path) / name
        with uncached():
            fit(
                stages.stage(config, stage, workdir, mesh),
                workdir=workdir,
                mesh=mesh,
                key=jax.random.key(0),
                log_every=1,
                checkpoint_every=100,
                keep=1,
            )
        losses[name] = harness.without_perf(logs.read(workdir / "metrics" / f"{stage}.jsonl"))
    for ours, theirs in zip(losses["eight"], losses["one"], strict=True):
        for key in theirs:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6), (theirs["step"], key)
