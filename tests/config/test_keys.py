"""A user's mistakes: one line that names the key and the fix, exit status 2, nothing written."""

import functools
import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest
from conftest import tiny
from ml_collections import ConfigDict

from configs import small
from rae_jax.build import models, objectives, part_weights, stages
from rae_jax.cli import train as cli_train
from rae_jax.config import checks
from rae_jax.config import keys as config_keys
from rae_jax.errors import UserError
from rae_jax.runtime import sharding

_PUBLISHED = ("--config.encoder.family=dinov2", "--config.encoder.weights=nowhere/at/all")


CONFIGS = sorted(path.stem for path in Path(small.__file__).parent.glob("*.py") if path.stem != "encoders")


def test_the_configs_are_right():
    """Every one passes the checks, every key is one that the small config has, and every part has a shape."""
    keys = set(config_keys.flatten(small.get_config().to_dict()))
    for name in CONFIGS:
        config = importlib.import_module(f"configs.{name}").get_config()
        assert config.name == name and set(config_keys.flatten(config.to_dict())) == keys
        checks.check(config, sharding.make_mesh(config.mesh))
        trained = config.stages if config.stages != small.get_config().stages else ()
        for part in {*trained, "encoder", "decoder", "statistics", "dit"}:
            placed = sharding.shardings(part_weights.shapes(config, part), sharding.make_mesh(config.mesh))
            assert jax.tree.leaves(placed), (name, part)


def test_full_size_latents_and_images_fit():
    latents = {"dit_b": (16, 16, 768), "dit_xl_512": (32, 32, 768)}
    for name, latent in latents.items():
        config = importlib.import_module(f"configs.{name}").get_config()
        assert config_keys.latent_shape(config) == latent
        autoencoder = models.autoencoder(config)
        side = config.data.image_size
        image = jax.ShapeDtypeStruct((2, side, side, 3), "float32")
        encoded = jax.eval_shape(autoencoder.encode, part_weights.shapes(config, "encoder"), image)
        assert jax.eval_shape(autoencoder.decode, part_weights.shapes(config, "decoder"), encoded).shape == image.shape


def test_epochs_become_steps_of_the_data_that_is_there():
    """The paper's schedule on ImageNet: 2502 whole batches of 512 an epoch."""
    config = importlib.import_module("configs.decoder_b").get_config()
    train = config_keys.in_steps(config, "decoder", 1_281_167).decoder.train
    counts = ("num_steps", "warmup_steps", "discriminator_start", "adversarial_start", "decay_start")
    assert [train[key] for key in counts] == [16 * 2502, 2502, 6 * 2502, 8 * 2502, 0]
    assert train.unit == "step" and config.decoder.train.num_steps == 16
    train = config_keys.in_steps(config, "dit", 1_281_167).dit.train
    counts = ("num_steps", "warmup_steps", "decay_start")
    assert [train[key] for key in counts] == [800 * 1251, 0, 40 * 1251] and train.unit == "step"
    small_config = tiny()
    assert config_keys.in_steps(small_config, "dit", 96) == small_config


def test_a_stage_runs_its_epochs(tiny_config, tmp_path):
    tiny_config.stages = ("judge",)
    tiny_config.judge.train.update({"unit": "epoch", "num_steps": 3, "warmup_steps": 1})
    stage = stages.stage(tiny_config, "judge", tmp_path, sharding.make_mesh(tiny_config.mesh))
    assert stage.num_steps == 3 * (96 // 16)


def test_the_full_size_discriminator_is_the_published_one():
    config = importlib.import_module("configs.decoder_xl").get_config()
    discriminator = objectives.decoder_objective(config).discriminator
    shapes = part_weights.shapes(config, "backbone")
    image = jax.ShapeDtypeStruct((2, 256, 256, 3), "float32")
    assert jax.eval_shape(discriminator.backbone, shapes, image).shape == (5, 2, 28 * 28, 384)
    disc = jax.eval_shape(discriminator.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(disc["params"])) == 5 * (384 * 384 * 10 + 384 * (2 + 4 + 1) + 1)


def test_a_decoder_of_larger_patches_or_on_another_grid():
    config = importlib.import_module("configs.decoder_b").get_config()
    config.data.image_size, config.decoder.patch_size = 512, 32  # from the same 256 tokens
    checks.check(config, sharding.make_mesh(config.mesh))
    config.decoder.update({"grid_size": 32, "patch_size": 16})
    checks.check(config, sharding.make_mesh(config.mesh))
    config.decoder.grid_size = 24
    with pytest.raises(UserError, match="config.data.image_size=512.*24 tokens"):
        checks.check(config, sharding.make_mesh(config.mesh))


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
        ("encoder.layers", ("/dev/null",)),
        ("decoder.patch_size", 8),
        ("decoder.width", 18),
        ("dit.width", 18),
        ("dit.patch_size", 3),
        ("dit.head_depth", -1),
        ("dit.head_width", 18),
        ("dit.train.batch_size", 12),
        ("dit.train.ema_decay", 1.0),
        ("dit.train.decay", "exponential"),
        ("dit.train.optimizer", "sgd"),
        ("dit.train.unit", "image"),
        ("dit.train.crop", "random"),
        ("evaluate.every", -1),
        ("evaluate.reference", "nowhere.npz"),
        ("discriminator.layers", (6,)),
        ("discriminator.layers", ()),
        ("discriminator.loss", "wasserstein"),
        ("discriminator.augment.prob", 1.5),
        ("discriminator.backbone.family", "small"),
        ("decoder.train.lpips_weight", -1.0),
        ("sampler.method", "midpoint"),
        ("sampler.reuse", 0),
        ("sampler.refresh", (0, 3)),
        ("sampler.rtol", 0.0),
        ("sampler.last_step_size", 1.0),
        ("dit.train.microbatches", 3),
        ("guidance.t_min", 2.0),
        ("guidance.scale", float("nan")),
        ("seed", -1),
        ("encoder.num_heads", 0),
        ("encoder.patch_size", 0),
        ("decoder.depth", 0),
        ("dit.num_heads", 0),
        ("dit.train.warmup_steps", -3),
        ("sampler.refresh", (1.5,)),
        ("encoder.layers", (0.5,)),
        ("encoder.num_registers", -1),
        ("encoder.mlp_ratio", 0.0),
        ("encoder.std", (0.0, 0.0, 0.0)),
        ("encoder.mean", (0.5, 0.5)),
        ("encoder.input_size", 16),
        ("judge.widths", ()),
        ("judge.widths", (30,)),
        ("decoder.train.noise_tau", -0.5),
        ("decoder.train.discriminator_start", -1),
        ("dit.head_width", 0),
        ("dit.head_num_heads", 0),
        ("dit.train.clip_norm", -1.0),
        ("dit.train.weight_decay", -0.1),
        ("dit.train.b1", 1.0),
        ("dit.train.decay_start", -1),
        ("dit.train.label_dropout", 2.0),
        ("dit.train.time_std", 0.0),
        ("dit.train.microbatches", 16),  # of one image, on eight devices
    ],
)
def test_impossible_values_are_named(tiny_config, key, value):
    tiny_config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f"config.{key}"):
        checks.check(tiny_config, sharding.make_mesh(tiny_config.mesh))


def test_a_guide_is_checked_as_the_dit_is(tiny_config):
    mesh = sharding.make_mesh(tiny_config.mesh)
    tiny_config.guidance.method = "autoguidance"
    with pytest.raises(UserError, match="config.guidance.dit.weights=''"):
        checks.check(tiny_config, mesh)
    tiny_config.guidance.dit.weights = "FOLDER"
    checks.check(tiny_config, mesh)
    for key, value in (("width", 18), ("head_width", 18), ("head_depth", -1), ("patch_size", 3), ("patch_size", 0)):
        wrong = tiny_config.copy_and_resolve_references()
        wrong.guidance.dit[key] = value
        with pytest.raises(UserError, match=f"config.guidance.dit.{key}"):
            checks.check(wrong, mesh)


@pytest.mark.parametrize("changes", [{"sampler.diffusion": "score_based"}, {"dit.prediction": "noise"}], ids=str)
def test_the_published_grid_begins_where_not_all_can(tiny_config, changes):
    mesh = sharding.make_mesh(tiny_config.mesh)
    tiny_config.sampler.update({"grid": "published", "method": "sde", "diffusion": "sigma"})
    checks.check(tiny_config, mesh)
    tiny_config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match="config.sampler.grid='published' cannot work"):
        checks.check(tiny_config, mesh)


def test_the_best_checkpoint_is_that_of_a_metric(tiny_config):
    mesh = sharding.make_mesh(tiny_config.mesh)
    tiny_config.evaluate.every = 2
    tiny_config.checkpoint.best = "fd"
    checks.check(tiny_config, mesh)
    for wrong in ("fdd", "probe"):  # probes are made at the end alone
        tiny_config.checkpoint.best = wrong
        with pytest.raises(UserError, match=f"config.checkpoint.best='{wrong}' cannot work: choose one of psnr"):
            checks.check(tiny_config, mesh)
    assert cli_train.score(ConfigDict({"best": "fd", "best_is": "lowest"}), {"psnr": 1.0}, must=False) == {}
    with pytest.raises(UserError, match="config.checkpoint.best='fd' cannot work: choose from psnr"):
        cli_train.score(ConfigDict({"best": "fd", "best_is": "lowest"}), {"psnr": 1.0}, must=True)


def test_cudnn_s_heads_are_those_that_attend():
    hopper = types.SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="H100")
    for name in ("sdvae_dit_xl", "plain_dit_xl", "dit_xl"):
        config = importlib.import_module(f"configs.{name}").get_config()
        config.update({"attention": "cudnn", "dtype": "bfloat16"})
        checks._check_attention(config, hopper)
    config.dit.num_heads = 96
    with pytest.raises(UserError, match="config.dit.width=1152 over 96 heads"):
        checks._check_attention(config, hopper)


def test_a_run_that_met_an_unreadable_image_goes_on_without_it(tiny_config, tmp_path):
    config_keys.save(tiny_config, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    tiny_config.data.on_error = "skip"
    config_keys.check_workdir(tiny_config, tmp_path)


# What a run computes depends on these sections and keys, but for those that say how much at a time, how to go on after
# an image that cannot be read, or which average is used.
_DECISIVE = (
    *("seed", "dtype", "stages", "data", "encoder", "judge", "decoder", "lpips", "discriminator"),
    *("statistics", "dit"),
)
_NOT_DECISIVE = ("data.num_threads", "data.num_workers", "data.on_error", "dit.train.microbatches", "dit.average")


def test_a_run_goes_on_by_its_own_recipe_alone(tiny_config, tmp_path):
    """Each key that training depends on is refused with another value; all others may be changed."""
    config_keys.save(tiny_config, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    whole = json.loads((tmp_path / "config.json").read_text())
    for key in config_keys.flatten(whole):
        changed = json.loads(json.dumps(whole))
        *path, last = key.split(".")
        functools.reduce(dict.get, path, changed)[last] = "another value"
        (tmp_path / "config.json").write_text(json.dumps(changed))
        if key.split(".")[0] in _DECISIVE and key not in _NOT_DECISIVE:
            with pytest.raises(UserError, match=f"config.{key}='another value'"):
                config_keys.check_workdir(tiny_config, tmp_path)
        else:
            config_keys.check_workdir(tiny_config, tmp_path)


def test_guidance_by_labels_takes_labels(tiny_config):
    tiny_config.dit.class_conditional = False
    with pytest.raises(UserError, match="config.guidance.method='cfg'.*class_conditional"):
        checks.check(tiny_config, sharding.make_mesh(tiny_config.mesh))
    tiny_config.guidance.method = "none"
    checks.check(tiny_config, sharding.make_mesh(tiny_config.mesh))


def test_a_run_goes_on_with_keys_that_a_later_version_brought(tiny_config, tmp_path):
    config_keys.save(tiny_config, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["data"]["on_error"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config_keys.check_workdir(tiny_config, tmp_path)
    tiny_config.data.image_size = 64
    with pytest.raises(UserError, match="config.data.image_size=32, not 64"):
        config_keys.check_workdir(tiny_config, tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff{")
    with pytest.raises(UserError, match="config.json is truncated or not JSON"):
        config_keys.check_workdir(tiny_config, tmp_path)


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
        (["--mode=evaluate", "--samples=nowhere.npz"], "--samples=nowhere.npz: it does not exist"),
        (["--mode=evaluate", "--samples=a.npz", "--step=5"], "leave one out"),
        (["--config.data.source=image_folder", "--config.data.path=nowhere"], "config.data.path='nowhere'"),
        (["--workdir=/dev/null/run"], "--workdir=/dev/null/run"),
    ],
)
def test_the_command_line_says_it_in_one_line(tmp_path, arguments, message):
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "rae_jax.main", "--config=configs/small.py", f"--workdir={workdir}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr
    assert not workdir.exists()
