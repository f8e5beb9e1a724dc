"""A user's mistakes: one line that names the thing and the mend, exit status 2, nothing written."""

import subprocess
import sys
from pathlib import Path

import pytest

from rae_jax import config as config_lib
from rae_jax import sharding
from rae_jax.errors import UserError

_PUBLISHED = ("--config.encoder.family=dinov2", "--config.encoder.weights=nowhere/at/all")


def test_the_configs_are_right():
    from configs import quickstart, small

    for module in (small, quickstart):
        config = module.get_config()
        config_lib.check(config, sharding.make_mesh(config.mesh))


@pytest.mark.parametrize(
    "key, value",
    [
        ("dtype", "float16"),
        ("stages", ("dit", "decoder")),
        ("stages", ("diffusion",)),
        ("log_every", 0),
        ("data.image_size", 30),
        ("encoder.family", "dinov2"),
        ("encoder.family", "resnet"),
        ("encoder.mlp", "relu"),
        ("encoder.input_size", 30),
        ("encoder.position_size", 30),
        ("encoder.layers", (0, 2)),
        ("decoder.patch_size", 8),
        ("decoder.width", 18),
        ("dit.width", 18),
        ("dit.train.batch_size", 12),
        ("dit.train.ema_decay", 1.0),
        ("dit.train.decay", "exponential"),
        ("dit.train.optimizer", "sgd"),
        ("discriminator.layers", (6,)),
        ("sampler.method", "midpoint"),
        ("guidance.t_min", 2.0),
        ("guidance.scale", float("nan")),
    ],
)
def test_impossible_values_are_named(tiny_config, key, value):
    tiny_config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f"config.{key}"):
        config_lib.check(tiny_config, sharding.make_mesh(tiny_config.mesh))


def test_a_mesh_that_does_not_fit_is_named(tiny_config):
    tiny_config.mesh.fsdp = 3
    with pytest.raises(UserError, match="config.mesh.fsdp=3.*8 devices"):
        sharding.make_mesh(tiny_config.mesh)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.dit.train.num_step=3"], 'unknown config key num_step: Did you mean "num_steps"'),
        (["--config.dit.train.num_steps=many"], "num_steps"),
        (["--config=configs/none.py"], "configs/none.py"),
        (["--mode=dream"], "--mode=dream"),
        (["--mode=reconstruct", "--images=.", "--config.stages=()", *_PUBLISHED], "'nowhere/at/all'"),
        (["--config.data.source=image_folder", "--config.data.path=nowhere"], "config.data.path='nowhere'"),
        (["--workdir=/dev/null/run"], "--workdir=/dev/null/run"),
    ],
)
def test_the_command_line_says_it_in_one_line(tmp_path, arguments, message):
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "rae_jax.main", "--config=configs/small.py", f"--workdir={workdir}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr
    assert not workdir.exists()
