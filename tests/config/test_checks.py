"""Values of a config that cannot work: one line names the key and the fix."""

import contextlib
import importlib
import types

import pytest
from conftest import one_device
from ml_collections import ConfigDict

from rae_jax.cli import train as cli_train
from rae_jax.config import checks, machine
from rae_jax.errors import UserError
from rae_jax.runtime import sharding


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
        machine.check_attention(config, hopper)
    config.dit.num_heads = 96
    with pytest.raises(UserError, match="config.dit.width=1152 over 96 heads"):
        machine.check_attention(config, hopper)


def test_guidance_by_labels_takes_labels(tiny_config):
    tiny_config.dit.class_conditional = False
    with pytest.raises(UserError, match="config.guidance.method='cfg'.*class_conditional"):
        checks.check(tiny_config, sharding.make_mesh(tiny_config.mesh))
    tiny_config.guidance.method = "none"
    checks.check(tiny_config, sharding.make_mesh(tiny_config.mesh))


@pytest.mark.parametrize("stage", ["encoder", "judge", "decoder", "dit"])
def test_the_learning_rate_does_not_rise_at_the_end(tiny_config, stage):
    train = tiny_config[stage].train
    train.learning_rate = train.final_learning_rate / 2
    with pytest.raises(UserError, match=f"config.{stage}.train.final_learning_rate=.* must not be above config"):
        checks.check_schedules(tiny_config)
    checks.check(tiny_config, sharding.make_mesh(tiny_config.mesh))  # a run of an older version may have it
    train.final_learning_rate = train.learning_rate
    checks.check_schedules(tiny_config)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dit.path": "vp"}, "config.dit.path='vp' cannot work: .* set it to 'linear'"),
        ({"dit.prediction": "noise"}, "config.dit.prediction='noise' cannot work: .* 'velocity' or 'data_in_velocity'"),
        ({"dit.prediction": "data"}, "config.dit.prediction='data' cannot work"),
        ({"dtype": "bfloat16"}, "config.few_step.derivative='differences' cannot work: .* set it to 'jvp'"),
        ({"few_step.objective": "teach"}, "config.few_step.objective='teach' cannot work: choose one of"),
        ({"few_step.train.microbatches": 3}, "it must divide config.few_step.train.batch_size=16"),
        ({"stages": ("dit",)}, "config.sampler.method='mean_velocity' cannot work: it needs a student"),
        (
            {"few_step.trajectories.points": 1},
            "config.few_step.trajectories.points=1 cannot work: it must be 2 or more",
        ),
        ({"dtype": "bfloat16", "few_step.derivative": "jvp"}, None),
        ({"dtype": "bfloat16", "few_step.objective": "trajectories"}, None),
        ({"dit.path": "cosine"}, None),
    ],
)
def test_what_the_few_step_student_needs(tiny_config, changes, message):
    tiny_config.stages, tiny_config.sampler.method = ("dit", "few_step"), "mean_velocity"
    tiny_config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        checks.check(tiny_config, one_device())
    if "dtype" in changes:  # what a training rounds away is no matter for sampling
        checks.check(tiny_config, one_device(), trains=False)
